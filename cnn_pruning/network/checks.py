"""Checks of what is handed in, and how values and errors are shown in a sentence."""

import inspect
import numbers
import operator
import textwrap
from contextlib import suppress

from torch import Tensor, nn


def check_module(model: nn.Module) -> None:
    """Raise ``TypeError`` unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be an nn.Module, but it is a {type(model).__name__}.")


def check_function(name: str, value: object, *arguments: str) -> None:
    """Raise ``TypeError`` unless ``value`` can be called with as many ``arguments``."""
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{name} must be a function of ({', '.join(arguments)}), but it is {shown(value)}."
        ) from None
    except ValueError:  # written in C, and doesn't say what it takes
        pass


def integer(name: str, value: object, lowest: int, highest: int = 2**63 - 1) -> int:
    """Return ``value`` as an integer of this range; else a ``ValueError`` with ``name``."""
    with suppress(TypeError, ValueError):
        if lowest <= index(value) <= highest:
            return index(value)
    kind = "a positive integer" if lowest == 1 else f"an integer of {lowest} or more"
    most = f" (at most {highest})" if isinstance(value, int) and value > highest else ""
    raise ValueError(f"{name} must be {kind}{most}, but it is {shown(value)}.")


def index(value: object) -> int:
    """Return ``value`` as an integer, numpy's too; a boolean or 3.0 is a ``TypeError``."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError(f"{value!r} is a boolean.")
    return operator.index(value)


def positive(name: str, value: object) -> float:
    """Return ``value`` as a number above 0 that float32 can hold; else a ``ValueError``."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < 1e38:
        return float(value)
    raise ValueError(f"{name} must be a positive number below 1e38, but it is {shown(value)}.")


def shown(value: object) -> str:
    """``value`` as it is shown in an error: on one line, and not too long."""
    return textwrap.shorten(repr(value), 100, placeholder=" ...")


def kind_of(value: object) -> str:
    """What ``value`` is, as it is said in an error: float32 (12, 3), or a list."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")[:200]
