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
_POOLING = """AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d CircularPad2d Dropout Dropout2d
    MaxPool2d ReflectionPad2d ReplicationPad2d Upsample UpsamplingBilinear2d UpsamplingNearest2d
    ZeroPad2d"""
_FUNCTIONS = """celu elu elu_ gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu
    leaky_relu_ logsigmoid mish relu relu6 relu_ selu silu softplus softshrink softsign tanhshrink
    threshold"""
_POOLING_FUNCTIONS = """adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d dropout dropout2d
    interpolate max_pool2d"""
_OF_TORCH = """abs add clamp clamp_max clamp_min clip div exp mul neg pow relu relu_ sigmoid
    square sub tanh"""
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
DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)
CASTS = ("to", "float", "double", "half", "bfloat16", "type")
ENDS = (
    *(nn.LogSoftmax, nn.Softmax, F.log_softmax, F.softmax, torch.log_softmax, torch.softmax),
    *("log_softmax", "softmax", "squeeze", torch.squeeze, operator.getitem),
)


class Shapes:
    """The nodes of a graph that are sizes of tensors, or are computed from these alone."""

    def __init__(self, graph: fx.Graph) -> None:
        self.of: dict[fx.Node, set[fx.Node]] = {}
        """The tensors whose sizes a node is made from."""
        self.batch: dict[fx.Node, fx.Node] = {}
        """How long the first axis of a tensor is, with that tensor."""
        whole: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            first, rest = (node.args[0], node.args[1:]) if node.args else (None, ())
            if node.op == "call_method" and node.target in ("dim", "ndimension"):
                self.of[node] = set()
            elif node.op == "call_method" and node.target in ("size", "numel"):
                self.of[node] = {first}
                axis = rest + tuple(node.kwargs.values())
                if node.target == "size" and axis in ((), (0,)):
                    (self.batch if axis else whole)[node] = first
            elif node.target is getattr and rest in (("shape",), ("ndim",)):
                self.of[node] = {first} if rest == ("shape",) else set()
                whole[node] = first
            elif node.op == "call_function" and node.all_input_nodes:
                if self.of.keys() >= set(node.all_input_nodes):
                    self.of[node] = set().union(*(self.of[n] for n in node.all_input_nodes))
                    if node.target is operator.getitem and first in whole and rest == (0,):
                        self.batch[node] = whole[first]

    def __contains__(self, node: object) -> bool:
        return node in self.of

    def sizes_used_by(self, node: fx.Node) -> set[fx.Node]:
        """The tensors of which ``node`` uses other sizes than how many examples there are."""
        used = [n for n in node.all_input_nodes if n in self.of and n not in self.batch]
        checks = node.target is torch._assert or node.op == "output"
        return set() if checks else set().union(*(self.of[n] for n in used))


def adapts(node: fx.Node) -> bool:
    """Whether ``node`` may use sizes of the feature maps: it shapes or pools them."""
    return node.target in RESHAPES or CALLS.get(node.target) is Kind.PASSIVE


def drops_in_evaluation(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that goes on in evaluation."""
    if node.target is torch.dropout:
        return node.args[2:] == (True,) or node.kwargs.get("train", False)
    return node.target in DROPOUTS and node.kwargs.get("training", True) is not False


def keeps_batch(
    node: fx.Node, layer: nn.Module | None, same_batch: set[fx.Node], shapes: Shapes
) -> bool:
    """Whether the first axis of ``node`` is that of the first input, as for ``same_batch``."""
    if node.op == "placeholder":
        return not same_batch
    tensors = [n for n in node.all_input_nodes if n not in shapes and n.op != "get_attr"]
    if not tensors or not same_batch.issuperset(tensors):
        return False
    if layer is not None:
        return MODULES.get(type(layer)) not in (None, Kind.FLATTEN, Kind.LINEAR)
    return node.target in CALLS or node.target in (F.pad, *CASTS)


def keeps_size(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` keeps the size of a row that a Flatten made."""
    return name_of(node, layer).lower().startswith(("dropout", "clone", "contiguous"))


def can_end(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` may shape the outputs of a network whose last layer is a convolution."""
    return type(layer) in ENDS if layer is not None else node.target in (*ENDS, *RESHAPES)


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
        maps = node.args[0]
        same_size = {maps, *maps.all_input_nodes[: maps.target in ("contiguous", "clone")]}
        adapts = columns == -1 or (columns in shapes and shapes.of[columns] <= same_size)
        if shapes.batch.get(rows) in same_batch and adapts:
            return Kind.FLATTEN
    return (
        "must make one row of each example for any number of filters (write torch.flatten(x, 1), "
        "or nn.Flatten())"
    )


def _pads(node: fx.Node) -> Kind | str:
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    if not given.get("value") and isinstance(given["pad"], tuple | list) and len(given["pad"]) <= 4:
        return Kind.PASSIVE
    return "pads with other than zeros, or other axes than those of the feature maps"


def _averages(node: fx.Node) -> Kind | str:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    places = given.get("dim", given.get("axis"))
    if not isinstance(places, tuple | list) or not all(type(place) is int for place in places):
        places = ()
    if {place % 4 for place in places} == {2, 3}:
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
