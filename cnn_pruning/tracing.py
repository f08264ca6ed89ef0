"""The graph of a network, traced from a copy, so that the network stays as it is."""

import builtins
import dis
import inspect
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks
from torch.optim.swa_utils import AveragedModel

from cnn_pruning.passes import check_module, copy_of

BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def hooked(layer: nn.Module, kinds: tuple[str, ...] = HOOKS) -> bool:
    """Whether ``layer`` has hooks of others, which may change what it puts out, or look at it."""
    found = [hook for kind in kinds for hook in getattr(layer, kind).values()]
    return not all(getattr(hook, "of_pruning", False) for hook in found)


def check_network(model: nn.Module) -> None:
    """Raise ``TypeError`` for what isn't a network of its own, with what to hand in instead."""
    check_module(model)
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise TypeError("There are hooks on all modules: remove them while you prune.")
    for name, layer in model.named_modules():
        where, inside = (name, f"{name}.") if name else ("The model", "model.")
        kind = type(layer).__name__
        instead = "hand in" if not name else "put in its place"
        if isinstance(layer, WRAPPERS):
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


def layers_that_share(model: nn.Module) -> set[nn.Module]:
    """Return the layers of ``model`` that have a parameter or a buffer in common with others."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for layer in model.modules():
        for value in (*layer._parameters.values(), *layer._buffers.values()):
            if value is not None:
                owners.setdefault(value, []).append(layer)
    return {layer for layers in owners.values() if len(layers) > 1 for layer in layers}


def trace(model: nn.Module, training: bool) -> fx.Graph:
    """Return the graph of ``model``, as it computes in training or in evaluation.

    Optional arguments of ``forward`` take their defaults, and what it asserts is taken to hold.
    A tensor that ``forward`` makes of numbers is the ``meta["constant"]`` of its node.
    Raises ``TypeError`` where ``forward`` depends on values that it computes.
    """
    copied = copy_of(model, share_parameters=True)
    copied.train(training)
    parameters = list(inspect.signature(type(model).forward).parameters.values())[2:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    numbers = random.getstate()
    try:
        with torch.random.fork_rng([]), torch.no_grad(), warnings.catch_warnings(), _symbolic_len():
            warnings.simplefilter("ignore")  # of arguments that take their defaults
            graph = _Tracer(autowrap_modules=()).trace(copied, defaults or None)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} can't be read as a chain of layers ({error}): its forward may "
            "not depend on what it computes (write torch.flatten(x, 1) for shapes computed by "
            "hand), or use Torch-Pruning, by way of cnn_pruning.groups."
        ) from error
    finally:
        random.setstate(numbers)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in vars(copied).keys() - vars(model).keys():
            node.meta["constant"] = getattr(copied, node.target)
    return graph


@contextmanager
def _symbolic_len() -> Iterator[None]:
    """``len`` of what is traced is its size, as PyTorch has it; of all else, what it always is."""
    length = builtins.len
    builtins.len = lambda x: x.size(0) if isinstance(x, fx.Proxy) else length(x)
    try:
        yield
    finally:
        builtins.len = length


class _Tracer(fx.Tracer):
    """fx's tracer, for which checks hold: an ``assert``, or an ``if`` that would raise."""

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):  # nothing is given by **kwargs and *args
            if isinstance(arg, fx.Proxy) and arg.node.target.startswith("*"):
                args[i] = {} if arg.node.target.startswith("**") else ()
                self.graph.erase_node(arg.node)
        return function, args

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
