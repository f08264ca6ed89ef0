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
    FEWER_AXES = auto()
    """As passive, and it takes an axis of the maps away, but not the last one."""
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
SQUEEZES = (torch.squeeze, "squeeze")
DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)
UNKNOWN = {  # what stops a reading often, with what to write instead
    **dict.fromkeys(
        ("detach", "detach_", torch.detach),
        "cuts off the gradient that the scores need (write the line without it, and freeze layers "
        "by requires_grad_(False))",
    ),
    **dict.fromkeys(
        ("permute", "transpose", "movedim", torch.permute, torch.transpose, torch.movedim),
        "moves the channels to another axis (write torch.flatten(x, 1) without it)",
    ),
}
CASTS = ("to", "float", "double", "half", "bfloat16", "type")
ENDS = (
    *(nn.LogSoftmax, nn.Softmax, F.log_softmax, F.softmax, torch.log_softmax, torch.softmax),
    *("log_softmax", "softmax", *SQUEEZES, operator.getitem),
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


def is_dropout(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` does nothing in evaluation."""
    return name_of(node, layer).lower().startswith("dropout")


def keeps_size(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` keeps the size of a row that a Flatten made, or of maps of one axis."""
    return is_dropout(node, layer) or node.target in ("clone", "contiguous", torch.clone)


def makes_points(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` pools each map to one value, and keeps both axes."""
    if layer is not None:
        pools = isinstance(layer, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
        return pools and layer.output_size in (1, (1, 1), [1, 1])
    if node.target in MEANS:
        return True
    size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    pools = node.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
    return pools and size in (1, (1, 1), [1, 1])


def can_end(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether ``node`` may shape the outputs of a network whose last layer is a convolution."""
    return type(layer) in ENDS if layer is not None else node.target in (*ENDS, *RESHAPES)


def kind_of(
    node: fx.Node,
    layer: nn.Module | None,
    maps: fx.Node,
    shapes: Shapes,
    same_batch: set[fx.Node],
    axes: int,
    points: bool,
) -> Kind | str:
    """Return what ``node`` does to ``maps``, or, where no rule is known, why it can't be read.

    ``same_batch`` are the tensors whose first axis holds the examples as that of ``maps`` does.
    ``maps`` have 4, 3 or 2 ``axes``, (N, K, ...); if they are ``points``, those after K are 1 long.
    """
    others = [other for other in node.all_input_nodes if other is not maps]
    if [other for other in others if other not in shapes]:
        return "takes the outputs of two layers"
    if layer is not None:
        return _kind_of_module(layer, axes)
    if node.target in FLATTENS:
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return _flattens(given.get("start_dim", 0), given.get("end_dim", -1), axes) or (
            "keeps other than the examples apart (write torch.flatten(x, 1), or nn.Flatten())"
        )
    if node.target in RESHAPES:
        return _reshapes(node, shapes, same_batch)
    if node.target in MEANS:
        return _averages(node, axes)
    if node.target in SQUEEZES and points and (len(node.args) > 1 or node.kwargs):
        return _without(node.kwargs.get("dim", node.args[-1]), axes) or "squeezes other axes"
    if node.target is operator.getitem and _picks_a_position(node.args[1], axes):
        return Kind.FLATTEN
    if node.target is F.pad:
        return _pads(node)
    if node.target is getattr and node.args[1:] == ("data",):
        return UNKNOWN["detach"]
    kind = CALLS.get(node.target)
    if kind is Kind.ACTIVATION and others:
        return "computes with the shape of the feature maps"
    return kind or UNKNOWN.get(node.target, "is an operation that no rule is known for")


def _kind_of_module(layer: nn.Module, axes: int) -> Kind | str:
    if type(layer) is nn.PReLU and layer.num_parameters != 1:
        return "is a PReLU with a slope for each channel"
    if type(layer) is nn.Flatten:
        return _flattens(layer.start_dim, layer.end_dim, axes) or (
            f"is a {layer}, which keeps more than the examples apart"
        )
    return MODULES.get(type(layer), f"is a {type(layer).__name__}, which no rule is known for")


def _flattens(start: object, end: object, axes: int) -> Kind | None:
    if type(start) is not int or type(end) is not int or end % axes != axes - 1:
        return None
    return {1: Kind.FLATTEN, 2: Kind.FEWER_AXES}.get(start % axes)


def _without(places: object, axes: int) -> Kind | None:
    """What it means to take the axes ``places`` of ``axes`` away, if they are those of the maps."""
    places = places if isinstance(places, tuple | list) else (places,)
    if not places or not all(type(place) is int for place in places):
        return None
    gone = {place % axes for place in places}
    if not gone <= {2, 3}:
        return None
    return Kind.FLATTEN if len(gone) == axes - 2 else Kind.FEWER_AXES


def _picks_a_position(places: object, axes: int) -> bool:
    """Whether ``x[places]`` is one position of each map."""
    places = list(places) if isinstance(places, tuple | list) else [places]
    if places[:1] == [...]:
        places[:1] = [slice(None)] * (axes - len(places) + 1)
    maps, position = places[:2], places[2:]
    return (
        maps == [slice(None)] * 2
        and len(position) == axes - 2
        and all(type(place) is int for place in position)
    )


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


def _averages(node: fx.Node, axes: int) -> Kind | str:
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    kind = _without(given.get("dim", given.get("axis")), axes)
    if kind and given.get("keepdim", False):
        kind = Kind.PASSIVE if kind is Kind.FLATTEN else None  # both axes, and both stay
    return kind or (
        "averages over other than the axes of the feature maps (write nn.AdaptiveAvgPool2d(1))"
    )


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
