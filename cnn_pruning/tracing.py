"""The graph of a network, traced from a copy, so that the network stays as it is."""

import dis
import inspect
import random
import warnings

import torch
from torch import fx, nn
from torch.nn.modules import module as hooks

from cnn_pruning.passes import copy_of

BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD)


def hooked(layer: nn.Module, kinds: tuple[str, ...] = HOOKS) -> bool:
    """Whether ``layer`` has hooks of others, which may change what it puts out, or look at it."""
    found = [hook for kind in kinds for hook in getattr(layer, kind).values()]
    return not all(getattr(hook, "of_pruning", False) for hook in found)


def check_network(model: nn.Module) -> None:
    """Raise ``TypeError`` for what isn't a network of its own, with what to hand in instead."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be an nn.Module, but it is a {type(model).__name__}.")
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise TypeError("There are hooks on all modules: remove them while you prune.")
    for name, layer in model.named_modules():
        where, inside = (name, f"{name}.") if name else ("The model", "model.")
        kind = type(layer).__name__
        instead = "hand in" if not name else "put in its place"
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(f"{where} is a {kind}: {instead} the network inside, {inside}module.")
        if hasattr(layer, "_orig_mod"):
            raise TypeError(
                f"{where} is what torch.compile returned: {instead} the network inside, "
                f"{inside}_orig_mod."
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a {kind}, traced or scripted: {instead} the network it was traced "
                "from."
            )
        if "forward" in vars(layer):
            raise TypeError(
                f"{where} has a forward of its own, set on the object: write it as a method of its "
                "class."
            )
        container = name and next(layer.children(), None) is not None
        if (container and hooked(layer)) or (name and hooked(layer, BACKWARD)):
            raise TypeError(f"{name} has hooks: remove them while you prune.")
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise TypeError(
                f"{where} is a {kind} without weights yet: run one batch through the network first."
            )


def trace(model: nn.Module, training: bool) -> fx.Graph:
    """Return the graph of ``model``, as it computes in training or in evaluation.

    Optional arguments of ``forward`` take their defaults, and what it asserts is taken to hold.
    Raises ``TypeError`` where ``forward`` depends on values that it computes.
    """
    copied = copy_of(model, share_parameters=True)
    copied.train(training)
    parameters = list(inspect.signature(type(model).forward).parameters.values())[2:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    numbers = random.getstate()
    try:
        with torch.random.fork_rng([]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arguments that take their defaults
            return _Tracer(autowrap_modules=()).trace(copied, defaults or None)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} can't be read as a chain of layers ({error}): its forward may "
            "not depend on what it computes (write torch.flatten(x, 1) for shapes computed by "
            "hand), or use Torch-Pruning, by way of cnn_pruning.groups."
        ) from error
    finally:
        random.setstate(numbers)


class _Tracer(fx.Tracer):
    """fx's tracer, for which checks hold: an ``assert``, or an ``if`` that would raise."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe().f_back.f_back  # behind Proxy.__bool__
        code = list(dis.get_instructions(frame.f_code))
        places = {step.offset: i for i, step in enumerate(code)}
        jump = places[frame.f_lasti]
        if code[jump].opname == "TO_BOOL":
            jump += 1
        if (
            "JUMP_IF" in code[jump].opname.replace("FORWARD_", "")
            and "NONE" not in code[jump].opname
        ):
            ahead, aside = _raises(code, jump + 1), _raises(code, places[code[jump].argval])
            if ahead != aside:
                return ("IF_TRUE" in code[jump].opname) == ahead
        return super().to_bool(obj)


def _raises(code: list[dis.Instruction], start: int) -> bool:
    """Whether the instructions from ``start`` only make an error and raise it."""
    for step in code[start:]:
        if step.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in step.opname or "STORE" in step.opname or "RETURN" in step.opname:
            return False
    return False
