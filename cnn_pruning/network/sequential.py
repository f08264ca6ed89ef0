"""A network that is a sequence of layers, read from its modules: no image is needed.

A convolution's filters go with what comes up to the next convolution or linear layer: the values
that batch norms hold for its channels, and the next layer's weights for them.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cnn_pruning.network.checks import shown
from cnn_pruning.network.description import BATCH_NORM, CONV, IN_OUTPUTS, Group, Network, Part
from cnn_pruning.network.passes import UnreadableError
from cnn_pruning.network.removal import size_name


def _layers(names: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, name) for name in names.split())


# They work on each value alone.
ACTIVATIONS = _layers(
    """Identity Dropout CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU
    LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
    Threshold"""
)
# They keep channels apart, and a map of zeros a map of zeros.
POOLING = _layers(
    """AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d
    CircularPad2d ReflectionPad2d ReplicationPad2d ZeroPad2d Dropout1d Dropout2d Dropout3d
    Upsample UpsamplingBilinear2d UpsamplingNearest2d"""
)
KNOWN = (
    *_layers("Conv1d Conv2d Conv3d Linear Flatten BatchNorm1d BatchNorm2d BatchNorm3d"),
    *(nn.SyncBatchNorm, *ACTIVATIONS, *POOLING),
)
ENDS = (nn.Softmax, nn.LogSoftmax)
PLAIN = [kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]


def read_sequential(model: nn.Module) -> Network:
    """Return the groups of ``model``: each convolution or linear layer but the last is one.

    Raises ``UnreadableError`` where the rules of this file don't say what a layer does.
    """
    layers = list(_in_order(model))
    groups: dict[str, Group] = {}
    conv, parts, rows = None, [], False  # the layer that is open, and what goes with it
    used: set[int] = set()
    for position, (name, layer) in enumerate(layers):
        if not _is_known(layer, ENDS if position == len(layers) - 1 else ()):
            kind = type(layer).__name__ if any(layer.children()) else shown(layer)
            raise UnreadableError(f"{name} is a {kind}")
        tensors = {id(value) for value in (*layer.parameters(), *layer.buffers())}
        if tensors & used:
            raise UnreadableError(f"{name} is used twice, or shares a weight")
        used |= tensors
        if isinstance(layer, (CONV, nn.Linear, *POOLING)) and isinstance(layer, nn.Linear) != rows:
            kind = "rows" if rows else "maps"
            raise UnreadableError(f"{name} is a {type(layer).__name__} that takes {kind}")
        rows = rows or isinstance(layer, nn.Flatten)
        if isinstance(layer, BATCH_NORM) and conv:
            parts.append(_part(name, "out", layer.num_features, conv[1]))
        elif isinstance(layer, CONV | nn.Linear):
            if conv:
                parts.append(_part(name, "in", getattr(layer, size_name(layer, "in")), conv[1]))
                groups[conv[0]] = Group(conv[1], tuple(parts))
            width = getattr(layer, size_name(layer, "out"))
            conv, parts = (name, width), [_part(name, "out", width, width)]
    if not any(isinstance(layer, CONV) for _, layer in layers):
        raise UnreadableError("there is no convolution")
    left_out = {conv[0]: IN_OUTPUTS} if conv else {}
    return Network(model, groups, left_out, name if isinstance(layer, nn.Softmax) else None)


def _in_order(module: nn.Module, name: str = ""):
    """Yield (name, layer) in the order of use, from sequences inside sequences."""
    if type(module).forward is nn.Sequential.forward:
        for child, layer in module._modules.items():  # named_children skips repeated ones
            yield from _in_order(layer, f"{name}.{child}".lstrip("."))
    elif inside := _one_call(module):
        yield from _in_order(module.get_submodule(inside), f"{name}.{inside}".lstrip("."))
    else:
        yield name or "the model", module


def _one_call(module: nn.Module) -> str | None:
    """The name of the submodule that ``forward`` hands its input on to, if it does nothing else.

    ``forward`` is run on stand-ins, which know nothing but this call.
    """
    images, result = object(), object()
    try:
        (name,) = module._modules
        stand_in = SimpleNamespace(**{name: lambda x: result if x is images else None})
        return name if type(module).forward(stand_in, images) is result else None
    except Exception:
        return None


def _is_known(layer: nn.Module, ends: tuple[type[nn.Module], ...]) -> bool:
    """Whether the rules hold for ``layer``: a subclass may compute something else."""
    if not any(
        isinstance(layer, kind) and type(layer).forward is kind.forward for kind in KNOWN + ends
    ):
        return False
    if isinstance(layer, CONV) and (layer.groups > 1 or type(layer)._conv_forward not in PLAIN):
        return False
    if isinstance(layer, CONV | nn.Linear) and "weight" not in layer._parameters:
        return False  # it is computed from others
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return not (isinstance(layer, nn.PReLU) and layer.num_parameters > 1)


def _part(name: str, side: str, size: int, filters: int) -> Part:
    """Behind a Flatten each filter has a block of values; otherwise, the block is one."""
    if size % filters:
        raise UnreadableError(f"{name} takes {size} values of {filters} filters")
    channels: Tensor = torch.arange(size)
    return Part(name, side, channels, channels // (size // filters))
