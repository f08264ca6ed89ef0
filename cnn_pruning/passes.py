"""The ground floor: one pass of a batch through a network, and checks of what is handed in."""

import copy
import inspect
import numbers
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy

Cost = Callable[[Tensor, Tensor], Tensor]
"""(outputs, labels) of a batch to what each of its N examples costs, (N,)."""


class NoGradientError(TypeError):
    """A layer whose filters have no gradient, because ``forward`` switches gradients off."""


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module of ``model`` at the end of the block."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """``model`` is in evaluation mode for the block; its training flags are restored after it."""
    with training_flags(model):
        model.eval()
        yield


def copy_of(model: nn.Module, share_parameters: bool = False) -> nn.Module:
    """Return a deep copy of ``model``, which can be trained even where gradients are off.

    What its ``forward`` keeps of an earlier pass is copied without its history. With
    ``share_parameters`` the copy has the parameters themselves.

    Raises ``TypeError`` if the network holds something that can't be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        memo |= {
            id(value): value.detach().clone()
            for value in vars(module).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
    if share_parameters:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise TypeError(
            f"The network can't be copied ({first_line(error)}): take out of it what isn't a "
            "layer or a tensor."
        ) from error


def check_module(model: nn.Module) -> None:
    """Raise ``TypeError`` unless ``model`` is an ``nn.Module``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be an nn.Module, but it is a {type(model).__name__}.")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the parameters of ``model``, to which the data are moved.

    Raises ``TypeError`` if ``model`` isn't an ``nn.Module``, or one without weights yet.
    """
    check_module(model)
    if any(map(is_lazy, model.parameters())):
        raise TypeError("The model has layers without weights yet: run one batch through it first.")
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def outputs_of(
    model: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return what ``model``, or ``forward`` in its place, puts out for a batch of images.

    Raises ``ValueError`` if the network fails on it, with the reason in one sentence.
    """
    try:
        return (forward or model)(images)
    except (torch.OutOfMemoryError, NoGradientError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if isinstance(model, nn.parallel.DistributedDataParallel):  # other ranks may be the reason
            raise
        kind = f"{images.dtype} {tuple(images.shape)}".removeprefix("torch.")
        weights = next((str(p.dtype) for p in model.parameters()), "").removeprefix("torch.")
        raise ValueError(
            f"The network can't take a batch of {kind} images ({first_line(error)}): check their "
            f"shape, (N, channels, height, width), and their dtype; its weights are {weights}."
        ) from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")[:200]


def shown(value: object) -> str:
    """``value`` as it is shown in an error: on one line, and not too long."""
    return textwrap.shorten(repr(value), 100, placeholder=" ...")


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


def call(name: str, function: Callable, *arguments: object) -> object:
    """Return what a caller's ``function`` returns; where it fails, a ``ValueError`` names it."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} failed on a mini-batch: {first_line(error)}.") from error


@contextmanager
def differentiable(loss: Tensor) -> Iterator[None]:
    """A block that differentiates ``loss``; where PyTorch can't, a ``TypeError`` says so."""
    if not loss.requires_grad:
        raise ValueError("The cost has no gradient: compute it from the outputs.")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TypeError(
            f"PyTorch can't differentiate the network ({first_line(error)}): use layers that have "
            "a derivative, and inplace=False behind one that needs what it put out."
        ) from error


def summed_loss(outputs: Tensor, labels: Tensor, cost: Cost | None = None) -> Tensor:
    """Return the cross-entropy (nats), summed over the examples, at least in float32.

    ``outputs`` are logits (N, classes), and ``labels`` are int64 (N,), from 0 to classes - 1. With
    ``cost``, what each example costs is ``cost(outputs, labels)``, (N,), instead.

    Raises ``ValueError`` for other outputs, labels or costs, and for outputs that are
    probabilities, of which the cross-entropy would take the softmax once more.
    """
    if cost is not None:
        check_function("The cost", cost, "outputs", "labels")
        each = call("The cost", cost, outputs, labels)
        shape = tuple(getattr(each, "shape", ()))
        if not isinstance(each, Tensor) or shape != (len(labels),):
            raise ValueError(
                f"The cost must return a tensor ({len(labels)},), one number for each example, but "
                f"it returned a {type(each).__name__} {shape}."
            )
        return each.sum()
    check_labels(outputs, labels)
    rounding = max(1e-5, 2 * torch.finfo(outputs.dtype).eps)
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if outputs.shape[1] > 1 and outputs.detach().amin() >= 0:
        if (outputs.detach().sum(1) - 1).abs().max() < rounding:
            raise ValueError(
                "The network's outputs are probabilities (each row sums to 1), but cross-entropy "
                "takes logits: leave out the softmax at the end, or use nn.LogSoftmax."
            )
    return cross_entropy(outputs, labels, reduction="sum")


def check_labels(outputs: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless there are logits (N, classes) and a label for each example."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"The network must return logits, a tensor (N, classes), but it returned a "
            f"{type(outputs).__name__}: hand in a network that returns the logits alone."
        )
    if outputs.dim() != 2:
        raise ValueError(
            f"The network must return logits (N, classes), but it returned {tuple(outputs.shape)}: "
            "let it end in nn.Flatten or nn.Linear, or give a cost of your own."
        )
    if not outputs.is_floating_point():
        raise ValueError(f"The network must return floating-point logits, not {outputs.dtype}.")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"The labels must be integers, but they are a {type(labels).__name__}: number the "
            "classes, or give a cost of your own."
        )
    if labels.shape != outputs.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"The labels must be int64 ({len(outputs)},), but they are "
            f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}."
        )
    low, high = labels.aminmax()
    if low < 0 or high >= outputs.shape[1]:  # cross_entropy would skip a label of -100
        raise ValueError(
            f"The labels must be from 0 to {outputs.shape[1] - 1}, one for each output of the "
            f"network, but they go from {low} to {high}."
        )


def on_device(values: object, device: torch.device) -> object:
    """``values`` on ``device``, and free of inference mode; what isn't a tensor stays as it is."""
    if not isinstance(values, Tensor):
        return values
    with torch.inference_mode(False):  # where a copy is free of it
        return values.clone().to(device) if values.is_inference() else values.to(device)


def pieces(
    loader: Iterable, device: torch.device, most: Callable[[], int] = lambda: 128
) -> Iterator[tuple[Tensor, object]]:
    """Yield the mini-batches of ``loader`` on ``device``; on a CPU, ``most()`` images at a time.

    For passes whose result doesn't depend on the batch. What lies between two layers then stays in
    the cache, and the memory doesn't grow with the batch. Labels that aren't a tensor stay whole,
    for the caller to refuse.
    """
    for images, labels in loader:
        images, labels = on_device(images, device), on_device(labels, device)
        whole = device.type != "cpu" or not isinstance(labels, Tensor)
        while len(images):
            size = len(images) if whole else most()
            yield images[:size], labels if whole else labels[:size]
            images, labels = images[size:], labels if whole else labels[size:]


def index(value: object) -> int:
    """Return ``value`` as an integer, numpy's too; a boolean or 3.0 is a ``TypeError``."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError(f"{value!r} is a boolean.")
    return operator.index(value)


def integer(name: str, value: object, lowest: int, highest: int = 2**63 - 1) -> int:
    """Return ``value`` as an integer of this range; else a ``ValueError`` with ``name``."""
    try:
        number = index(value)
        if lowest <= number <= highest:
            return number
    except (TypeError, ValueError):
        pass
    kind = "a positive integer" if lowest == 1 else f"an integer of {lowest} or more"
    most = f" (at most {highest})" if isinstance(value, int) and value > highest else ""
    raise ValueError(f"{name} must be {kind}{most}, but it is {shown(value)}.")


def positive(name: str, value: object) -> float:
    """Return ``value`` as a number above 0 that float32 can hold; else a ``ValueError``."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < 1e38:
        return float(value)
    raise ValueError(f"{name} must be a positive number below 1e38, but it is {shown(value)}.")
