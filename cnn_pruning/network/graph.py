"""Any other network, read from what it computes for a few images, by Torch-Pruning's graph.

The graph says which channels of which layer each channel is tied to. Here they are followed from
each convolution until nothing new is found. Filters that meet in one channel can only go together.

Source: the dependency graph of Fang et al. 2023 (arXiv 2301.12900).
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
import torch_pruning
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively
from torch_pruning.ops import OPTYPE, _OutputOp

from cnn_pruning.network.checks import first_line
from cnn_pruning.network.description import BATCH_NORM, CONV, IN_OUTPUTS, ONE_MAP, Group, Part
from cnn_pruning.network.passes import Inputs, UnreadableError, outputs_of
from cnn_pruning.network.removal import is_depthwise, size_name

MAPPINGS = {
    OPTYPE[kind.upper()]: getattr(index_mapping, f"update_{kind}_index_mapping")
    for kind in ("concat", "split", "reshape", "unbind", "expand")
}
NORMS = BATCH_NORM | nn.modules.instancenorm._InstanceNorm | nn.PReLU | nn.GroupNorm
HARMLESS = set(
    """add sub mul div pow exp neg abs sqrt rsqrt relu threshold sigmoid hardsigmoid hardswish silu
    gelu elu leaky_relu hardtanh softplus mish tanh log_sigmoid clamp clamp_min mean cat clone
    max_pool2d_with_indices max_pool1d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d
    upsample_nearest2d upsample_bilinear2d constant_pad_nd squeeze unsqueeze native_dropout
    bernoulli native_batch_norm cudnn_batch_norm t alias""".split()
)
BY_VALUE = ("__bool__", "__int__", "__float__", "item", "nonzero", "nms", "masked_select")
DRAWS = set(
    """rand randn randint randperm normal bernoulli multinomial rand_like randn_like randint_like
    normal_ uniform_ exponential_ bernoulli_ random_""".split()
)


class _Graph(torch_pruning.DependencyGraph):
    """A graph in which the widest input of an operation tells how many channels come out, so that
    maps times a single map are read alike in either order. Torch-Pruning asks the last input.
    """

    def _build_dependency(self, module2node: dict) -> None:
        super()._build_dependency(module2node)
        for node in reversed(module2node.values()):  # what comes first is known first
            if node.type == OPTYPE.ELEMENTWISE:
                node.inputs.sort(key=lambda n: infer_out_channels_recursively(self, n, [0]) or 0)


class _Images(BATCH_NORM):
    """The images as a layer: without it, the graph wouldn't know what is tied to their channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clone()


def read_graph(traced: nn.Module, images: Inputs) -> tuple[dict[str, Group], dict[str, str]]:
    """Return the groups of ``traced``, a copy that may be changed, and why others can't go.

    Raises ``TypeError`` if it can't be read at all.
    """
    evaluated, trained = (_layers_used(traced, images, mode) for mode in (False, True))
    for name, maker in evaluated.items():
        if maker and maker != trained.get(name, maker) != "":
            raise TypeError(
                f"In training, {name} takes what {trained[name]} puts out, but in evaluation what "
                f"{maker} does: only dropout and batch norm may differ."
            )
    both = not trained.keys() <= evaluated.keys()
    reader = _Reader(traced, _graph(traced, images, both))
    groups, seen = {}, set()
    others = [n for n, m in traced.named_modules() if isinstance(m, CONV) and n not in evaluated]
    left_out = dict.fromkeys(others, "forward doesn't call it as a layer")
    left_out |= {n: "it is used in training alone" for n in others if n in trained}
    layers = {name: traced.get_submodule(name) for name in evaluated}
    # Convolutions first, because a group has the name of one, if there is one in it.
    for name, layer in sorted(layers.items(), key=lambda item: not isinstance(item[1], CONV)):
        if not isinstance(layer, CONV | nn.Linear) or layer in seen:
            continue
        seen.add(layer)
        try:
            groups[name], together = reader.group(name)
            seen |= together
        except UnreadableError as obstacle:
            left_out[name] = str(obstacle)
    return {name: groups[name] for name in evaluated if name in groups}, left_out


def _layers_used(network: nn.Module, images: Inputs, training: bool) -> dict[str, str]:
    """The layers without layers inside, in the order of use, and what function made their input.

    In training, a network that can't take these few images uses none.
    """
    used: dict[str, str] = {}
    names = {layer: name for name, layer in network.named_modules()}

    def note(layer: nn.Module, inputs: tuple) -> None:
        used.setdefault(names[layer], getattr(next(iter(inputs), None), "_maker", ""))

    seen = (m for m in names if isinstance(m, CONV | nn.Linear) or not any(m.children()))
    hooks = [layer.register_forward_pre_hook(note) for layer in seen]
    network.train(training)
    try:
        with torch.no_grad(), _Makers(training):
            outputs_of(network, images)
    except ValueError:
        if not training:
            raise
        used.clear()
    for hook in hooks:
        hook.remove()
    return used


class _Makers(TorchFunctionMode):
    """Notes on each tensor what function, but dropout, made it. In evaluation, random numbers and
    what depends on the values in a tensor are errors: other images might take another way.
    """

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        given = {"train": args[2] if len(args) > 2 else False, **(kwargs or {})}
        output = function(*args, **(kwargs or {}))
        chosen = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        if (name in BY_VALUE or chosen) and not self.training:
            raise UnreadableError(
                "The network's forward depends on values that it computes (an if on a tensor, or "
                f"{name.strip('_')}), so it can't be read from a few images."
            )
        drops = "dropout" in name
        draws = name in DRAWS or (drops and given.get("training", given["train"]))
        if draws and not self.training:
            raise UnreadableError(
                f"The network's forward draws random numbers in evaluation, too ({name}), so that "
                "no score would be the same twice: draw if self.training only (nn.Dropout, or "
                "training=self.training)."
            )
        if isinstance(output, Tensor):
            output._maker = getattr(given.get("input", *args[:1]), "_maker", "") if drops else name
        return output


def _graph(traced: nn.Module, images: Inputs, both: bool) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's graph of evaluation, or of ``both`` modes: then layers that are used in
    training alone are tied, too.
    """
    own: dict[nn.Parameter, int | None] = {}
    for layer in traced.modules():
        if getattr(layer, "inplace", False):  # on a view, it would take layers out of the graph
            layer.inplace = False
        if isinstance(layer, NORMS):
            continue
        for name, value in [*layer._buffers.items()]:  # the graph sees parameters alone
            if value is not None and value.is_floating_point():
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(value))
        if not isinstance(layer, CONV | nn.Linear):
            own |= {parameter: _axis_of(parameter) for parameter in layer.parameters(recurse=False)}
    traced.requires_grad_()
    # A PReLU with one slope has no channels. As a layer of the graph it would tie those of all the
    # places where it is used, and the graph would take its slope for the maps.
    plain = [m for m in traced.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
    nn.ModuleList(plain).requires_grad_(False)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in tree_leaves(images)]
    first = [
        _Images(x.shape[1], affine=False) if x.requires_grad and x.dim() > 1 else nn.Identity()
        for x in inputs
    ]

    def forward(whole: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        found = []
        for training in (False, True) if both else (False,):
            traced.train(training)
            taken = [layer(x) for layer, x in zip(first, inputs, strict=True)]
            found += [y for y in floats_in(outputs_of(traced, taken)) if y.grad_fn is not None]
        # Only outputs that aren't a layer's are marked as the network's, so here are clones.
        return [output.clone() for output in found]

    graph = _Graph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                nn.ModuleList([*first, traced]),
                inputs,
                forward_fn=forward,
                unwrapped_parameters=[(p, axis) for p, axis in own.items() if axis is not None],
                ignored_layers=plain,
                verbose=False,
            )
        except Exception as error:  # often of one operation, which ``_Reader`` finds again
            if not hasattr(graph, "module2node"):
                name = type(traced).__name__
                raise TypeError(f"{name} can't be read ({first_line(error)}).") from error
    if any("checkpoint" in _named(node) for node in graph.module2node.values()):
        raise TypeError(
            f"{type(traced).__name__} uses gradient checkpointing with use_reentrant=True, behind "
            "which nothing can be read: switch it off."
        )
    return graph


def _axis_of(parameter: Tensor) -> int | None:
    """The axis of the channels: of (1, C, H, W) or more, (C, H, W), or the last longer than 1."""
    longer = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    usual = 0 if parameter.dim() == 3 else 1
    of_maps = parameter.dim() > 2 and longer[:1] == [usual]
    return usual if of_maps else max(longer, default=None)


def _map_slice(graph: torch_pruning.DependencyGraph, node) -> None:
    """Tell the graph which channels a slice takes. Torch-Pruning looks for them in axis 2 of three,
    where a sequence has its steps, and can't count from the end.
    """
    sizes, axis = node.grad_fn._saved_self_sym_sizes, 1
    channels = infer_out_channels_recursively(graph, node.inputs[0], [0])
    if len(sizes) == 3 and channels != sizes[1]:
        axis = 2  # tokens
    ends = (k - 2**64 if k >= 2**63 else k for k in (node.module.start, node.module.end))
    start, end, step = slice(*ends, node.module.step).indices(sizes[axis])
    taken = partial(index_mapping._SliceIndexMapping, axis, start, step, end)
    for source in node.inputs:
        for one, other, back in ((node, source, True), (source, node, False)):
            for dependency in one.dependencies:
                if dependency.target == other:
                    all_pass = node.grad_fn._saved_dim != axis
                    dependency.index_mapping[0] = None if all_pass else taken(back)


class _Reader:
    """Follows the channels of one layer after the other through the graph."""

    def __init__(self, traced: nn.Module, graph: torch_pruning.DependencyGraph) -> None:
        self.traced, self.graph = traced, graph
        self.names = {layer: name for name, layer in traced.named_modules()}
        self.names |= {parameter: name for name, parameter in traced.named_parameters()}
        self.uses = Counter(w for layer in traced.modules() for w in layer._parameters.values())
        sizes = [size for parameter in traced.parameters() for size in parameter.shape]
        self.most = 2 * max(sizes, default=0)  # more channels are a sign of a misread operation
        self.broken = set()
        mappings = MAPPINGS | {OPTYPE.SLICE: _map_slice}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for node in graph.module2node.values():
                try:
                    mappings.get(node.type, lambda *_: None)(graph, node)
                except Exception:  # Torch-Pruning can't say what this operation does to channels
                    self.broken.add(node)

    def group(self, name: str) -> tuple[Group, set[nn.Module]]:
        """The group of a layer's filters, and the layers whose channels are all in it."""
        root = self.graph.module2node.get(self.traced.get_submodule(name))
        if root is None:
            raise UnreadableError(
                "no gradient comes back from the outputs to it: it runs under torch.no_grad(), in "
                "gradient checkpointing or before a detach() in forward, or its output isn't used"
            )
        size = getattr(root.module, size_name(root.module, "out"))
        found, leader = self._follow(root, size)
        operations = {_named(node) for node, _ in found if node.module not in self.names}
        passed = tuple(sorted(operations - HARMLESS))
        if any(isinstance(node.module, _OutputOp) for node, _ in found):
            taken = any(side == "in" and node.module in self.names for node, side in found)
            raise UnreadableError(IN_OUTPUTS + ", too" * taken)
        number = {k: i for i, k in enumerate(sorted({*leader}))}
        parts, together = [], set()
        for (node, side), known in found.items():
            layer = node.module
            if layer not in self.names:  # an operation
                continue
            if isinstance(layer, nn.Parameter):
                side, axis, width = "", node.pruning_dim, layer.shape[node.pruning_dim]
            else:
                axis, width = 0, getattr(layer, size_name(layer, side))
            channels = sorted(known)
            owners = torch.tensor([number[leader[known[c]]] for c in channels])
            uneven = len(owners.bincount(minlength=len(number)).unique()) > 1
            if uneven or channels[-1] >= width:
                raise UnreadableError(counts_on_them(passed))
            parts.append(Part(self.names[layer], side, torch.tensor(channels), owners, axis))
            together |= {layer} if side == "out" else set()
        if len(number) == 1 < size:
            raise UnreadableError(f"{size} filters that can only go together")
        parts.sort(key=lambda part: (part.name != name, part.side == "in"))
        return Group(len(number), tuple(parts), passed), together

    def _follow(self, root, size: int) -> tuple[dict[tuple, dict[int, int]], list[int]]:
        """All (layer or operation, side) that the filters of ``root`` are tied to, with the filter
        that each channel there goes with; and for each filter the first that it goes with.
        """
        leader = list(range(size))
        found: dict[tuple, dict[int, int]] = {}

        def mixed(node) -> UnreadableError:
            for operation, _ in found:  # it may be one of several that a GRU, say, consists of
                for source in operation.inputs:
                    if isinstance(source.module, nn.Parameter):
                        self._check(source)
            return UnreadableError(f"{_named(node)} mixes them")

        stack = [(root, "out", [_HybridIndex(idx=k, root_idx=k) for k in range(size)])]
        while stack:
            node, side, pairs = stack.pop()
            if isinstance(node.module, CONV | nn.Linear) and side == "out":
                there = getattr(node.module, size_name(node.module, side))
                if size == 1 < there and not is_depthwise(node.module):
                    raise UnreadableError(ONE_MAP)
                if there == 1 < size:
                    continue  # its one map is multiplied with all of theirs
            self._check(node)
            known, new = found.setdefault((node, side), {}), []
            for pair in pairs:
                for channel in _tied(node.module, side, pair.idx):
                    if channel in known:
                        both = {leader[known[channel]], leader[pair.root_idx]}
                        if len(both) > 1:
                            leader = [min(both) if k in both else k for k in leader]
                    else:
                        known[channel] = pair.root_idx
                        new.append(_HybridIndex(idx=channel, root_idx=pair.root_idx))
            if len(known) > self.most:
                raise mixed(node)
            pruner = self.graph.get_pruner_of_module(node.module)
            trigger = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
            for dependency in node.dependencies if new else ():
                if dependency.is_triggered_by(trigger):
                    pairs = new
                    try:
                        for mapping in filter(None, dependency.index_mapping):
                            pairs = mapping(pairs)
                    except IndexError:
                        raise mixed(node) from None
                    if pairs:
                        out = self.graph.is_out_channel_pruning_fn(dependency.handler)
                        stack.append((dependency.target, "out" if out else "in", pairs))
        return found, leader

    def _check(self, node) -> None:
        """Raise ``UnreadableError`` for what can't lose channels."""
        layer, name = node.module, self.names.get(node.module)
        if isinstance(layer, _Images):
            raise UnreadableError("their maps are combined with the images")
        if node in self.broken:
            raise UnreadableError(f"{_named(node)} mixes them")
        if name is None:
            return
        known, own = isinstance(layer, CONV | nn.Linear | NORMS), False
        if isinstance(layer, nn.Parameter):
            name = name.rpartition(".")[0]
            layer = self.traced.get_submodule(name)
            own = not type(layer).__module__.startswith("torch.nn.")
        if not known and not own:
            raise UnreadableError(f"{name} is a {type(layer).__name__}, which needs all of them")
        if any(self.uses[value] > 1 for value in layer.parameters(recurse=False)):
            raise UnreadableError(f"{name} shares a weight with another layer")
        if known and "weight" not in layer._parameters:
            raise UnreadableError(
                f"{name} has a weight that is computed from others (use remove_parametrizations)"
            )


def _tied(layer: object, side: str, channel: int) -> Iterable[int]:
    """The channels of a layer that must go together with one of them."""
    if isinstance(layer, CONV) and layer.groups > 1 and not is_depthwise(layer):
        size = getattr(layer, size_name(layer, side))
        each = size // layer.groups  # each of the groups must lose the same
        return range(channel % each, size, each)
    if isinstance(layer, nn.GroupNorm):
        each = layer.num_channels // layer.num_groups
        return range(channel - channel % each, channel - channel % each + each)
    return (channel,)


def counts_on_them(passed: Iterable[str]) -> str:
    """Why filters can't go whose maps pass these operations, if their number stands in one."""
    said = f"{' or '.join(sorted(passed)) or 'something'} behind them counts on their number"
    return said + " (write torch.flatten(x, 1) instead of a fixed width)" * ({*passed} == {"view"})


def _named(node) -> str:
    """The operation that made a tensor, by the name that PyTorch's users know."""
    if node.grad_fn is None:
        return "an operation"
    name = re.sub(r"Backward\d*$", "", node.grad_fn.name().rpartition("::")[2])
    return re.sub(r"(?<=\w)(?=[A-Z][a-z])", "_", name).lower().removeprefix("unsafe_")


def floats_in(outputs: object) -> list[Tensor]:
    """The floating-point tensors that a network puts out, in tuples, dictionaries or an object."""
    found = []
    for value in tree_leaves(outputs):
        if isinstance(value, Tensor):
            found += [value] if value.is_floating_point() else []
        elif hasattr(value, "__dict__"):
            found += floats_in([*vars(value).values()])
    return found
