"""What an operation in a network's graph does to feature maps, however it is written."""

import operator
from enum import Enum, auto

import torch
from torch import fx, nn
from torch.nn import functional as F


class Kind(Enum):
    """What an operation on feature maps means for the filters that they belong to."""

    NOTHING = auto()
    """It isn't computed at all."""
    PASSIVE = auto()
    """It keeps channels apart, and a map of zeros a map of zeros."""
    ACTIVATION = auto()
    """It works on each value alone."""
    NORM = auto()
    """It has values for each channel."""
    FLATTEN = auto()
    """It makes one row of each example, channel after channel."""
    LINEAR = auto()
    """It has weights for each value of a row."""


_ACTIVATIONS = """CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish
    PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"""
_POOLING = """AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d Dropout Dropout2d MaxPool2d Upsample
    ZeroPad2d"""
_FUNCTIONS = """celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish
    relu relu6 relu_ selu silu softplus softshrink softsign tanhshrink threshold"""
_POOLING_FUNCTIONS = """adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d dropout dropout2d
    interpolate max_pool2d"""
_OF_TORCH = """abs add clamp clamp_max clamp_min div exp mul neg pow relu relu_ sigmoid square sub
    tanh"""
_OPERATORS = "abs add iadd imul isub itruediv mul neg pow sub truediv"
_METHODS = """abs abs_ add add_ clamp clamp_ clamp_max clamp_min clip div div_ exp mul mul_ neg pow
    relu relu_ sigmoid sigmoid_ square sub sub_ tanh tanh_"""


def _named(owner: object, names: str, kind: Kind) -> dict:
    return {getattr(owner, name): kind for name in names.split()}


MODULES: dict[type[nn.Module], Kind] = {
    nn.Identity: Kind.NOTHING,
    nn.Linear: Kind.LINEAR,
    nn.BatchNorm1d: Kind.NORM,
    nn.BatchNorm2d: Kind.NORM,
    nn.Flatten: Kind.FLATTEN,
    **_named(nn, _POOLING, Kind.PASSIVE),
    **_named(nn, _ACTIVATIONS, Kind.ACTIVATION),
}
CALLS: dict[object, Kind] = {  # functions by themselves, methods by their names
    **_named(F, _POOLING_FUNCTIONS, Kind.PASSIVE),
    **_named(torch, "clone dropout max_pool2d", Kind.PASSIVE),
    **dict.fromkeys(("clone", "contiguous"), Kind.PASSIVE),
    **_named(F, _FUNCTIONS, Kind.ACTIVATION),
    **_named(torch, _OF_TORCH, Kind.ACTIVATION),
    **_named(operator, _OPERATORS, Kind.ACTIVATION),
    **dict.fromkeys(_METHODS.split(), Kind.ACTIVATION),
}
FLATTENS = (torch.flatten, "flatten")
RESHAPES = (torch.reshape, "reshape", "view")
MEANS = (torch.mean, torch.amax, "mean", "amax")
# These may change which axis holds the examples.
MOVERS = ("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "unsqueeze")


class Shapes:
    """The nodes of a graph that are sizes of tensors, or are computed from these alone."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: set[fx.Node] = set()
        self.batch: dict[fx.Node, fx.Node] = {}
        """How long the first axis of a tensor is, with that tensor."""
        whole: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            first, rest = (node.args[0], node.args[1:]) if node.args else (None, ())
            if node.op == "call_method" and node.target in ("size", "dim", "numel"):
                self.nodes.add(node)
                if node.target == "size" and not node.kwargs:
                    (whole if rest == () else self.batch if rest == (0,) else {})[node] = first
            elif node.target is getattr and rest in (("shape",), ("ndim",)):
                self.nodes.add(node)
                whole[node] = first
            elif node.op == "call_function" and node.all_input_nodes:
                if self.nodes.issuperset(node.all_input_nodes):
                    self.nodes.add(node)
                    if node.target is operator.getitem and first in whole and rest == (0,):
                        self.batch[node] = whole[first]

    def __contains__(self, node: object) -> bool:
        return node in self.nodes


def moves_axes(node: fx.Node) -> bool:
    """Whether another axis than before may hold the examples behind ``node``."""
    return getattr(node.target, "__name__", node.target) in MOVERS


def kind_of(
    node: fx.Node, layer: nn.Module | None, maps: fx.Node, shapes: Shapes, same_batch: set[fx.Node]
) -> Kind | str:
    """Return what ``node`` does to ``maps``, or, where no rule is known, why it can't be read.

    ``same_batch`` are the tensors whose first axis holds the examples as that of ``maps`` does.
    """
    others = [other for other in node.all_input_nodes if other is not maps]
    if [other for other in others if other not in shapes]:
        return "takes the outputs of two layers"
    if layer is not None:
        return _kind_of_module(layer)
    if node.target in FLATTENS:
        return _flattens(node)
    if node.target in RESHAPES:
        return _reshapes(node, shapes, same_batch)
    if node.target in MEANS:
        return _averages(node)
    if node.target is F.pad:
        return _pads(node)
    kind = CALLS.get(node.target)
    if kind is Kind.ACTIVATION and others:
        return "computes with the shape of the feature maps"
    return kind or "is an operation that no rule is known for"


def _kind_of_module(layer: nn.Module) -> Kind | str:
    if type(layer) is nn.PReLU and layer.num_parameters != 1:
        return "is a PReLU with a slope for each channel"
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) not in ((1, -1), (1, 3)):
        return f"is a {layer}, which keeps more than the examples apart"
    return MODULES.get(type(layer), f"is a {type(layer).__name__}, which no rule is known for")


def _flattens(node: fx.Node) -> Kind | str:
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    if given.get("start_dim") == 1 and given.get("end_dim", -1) in (-1, 3):
        return Kind.FLATTEN
    return "keeps other than the examples apart (write torch.flatten(x, 1), or nn.Flatten())"


def _reshapes(node: fx.Node, shapes: Shapes, same_batch: set[fx.Node]) -> Kind | str:
    sizes = node.args[1:] if len(node.args) != 2 else node.args[1]
    sizes = tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,)
    if len(sizes) == 2 and not node.kwargs:
        rows, columns = sizes
        if shapes.batch.get(rows) in same_batch and (columns == -1 or columns in shapes):
            return Kind.FLATTEN
    return (
        "must make one row of each example for any number of filters (write torch.flatten(x, 1), "
        "or nn.Flatten())"
    )


def _pads(node: fx.Node) -> Kind | str:
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    if zeros and len(given["pad"]) <= 4:
        return Kind.PASSIVE
    return "pads with other than zeros, or other axes than those of the feature maps"


def _averages(node: fx.Node) -> Kind | str:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    places = given.get("dim")
    if isinstance(places, tuple | list) and {place % 4 for place in places} == {2, 3}:
        return Kind.PASSIVE if given.get("keepdim", False) else Kind.FLATTEN
    return "averages over other than both axes of the feature maps (write nn.AdaptiveAvgPool2d(1))"


def is_convolution(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` is a convolution of another kind than ``nn.Conv2d``."""
    if layer is not None:
        return isinstance(layer, nn.modules.conv._ConvNd)
    return node.op == "call_function" and name_of(node, layer).startswith("conv")


def is_softmax(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` puts out probabilities."""
    if layer is not None:
        return isinstance(layer, nn.Softmax)
    return node.target in (F.softmax, torch.softmax, "softmax")


def name_of(node: fx.Node, layer: nn.Module | None) -> str:
    """Return the name of the operation, for an error."""
    if layer is not None:
        return type(layer).__name__
    return getattr(node.target, "__name__", str(node.target))
