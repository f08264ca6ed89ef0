"""Any other network, read from what it computes for a few images, by Torch-Pruning's graph.

The graph says which channels of which layer each channel is tied to. Here they are followed from
each convolution until nothing new is found. Filters that meet in one channel can only go together.

Source: the dependency graph of Fang et al. 2023 (arXiv 2301.12900).
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
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
from cnn_pruning.network.passes import Inputs, UnreadableError, outputs_of, training_flags
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


class _Obstacle(Exception):
    """Why the filters that are being followed can't go."""


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
    in_training = trained.keys() - evaluated.keys()
    reader = _Reader(traced, _graph(traced, images, both=bool(in_training)))
    groups, seen = {}, set()
    unused = "forward doesn't call it as a layer"
    left_out = {
        name: "it is used in training alone" if name in in_training else unused
        for name, layer in traced.named_modules()
        if isinstance(layer, CONV) and name not in evaluated
    }
    convolutions = {n: isinstance(traced.get_submodule(n), CONV) for n in evaluated}
    # They come first, because a group has the name of a convolution, if there is one in it.
    for name in sorted(evaluated, key=lambda name: not convolutions[name]):
        layer = traced.get_submodule(name)
        if not isinstance(layer, CONV | nn.Linear) or layer in seen:
            continue
        seen.add(layer)
        try:
            group, together = reader.group(name, layer)
            if group.filters == 1 < group.channels():
                raise _Obstacle(f"{group.channels()} filters that can only go together")
            groups[name] = group
            seen |= together
        except _Obstacle as obstacle:
            left_out[name] = str(obstacle)
    return {name: groups[name] for name in evaluated if name in groups}, left_out


def _layers_used(network: nn.Module, images: Inputs, training: bool) -> dict[str, str]:
    """The layers without layers inside, in the order of use, and what function made their input.

    In training, a network that can't take these few images uses none.
    """
    used: dict[str, str] = {}
    with ExitStack() as stack:
        for name, layer in network.named_modules():
            if isinstance(layer, CONV | nn.Linear) or not any(layer.children()):

                def record(_: nn.Module, inputs: tuple, name: str = name) -> None:
                    used.setdefault(name, getattr(next(iter(inputs), None), "_maker", ""))

                stack.callback(layer.register_forward_pre_hook(record).remove)
        for context in (torch.no_grad(), training_flags(network), _Makers(training)):
            stack.enter_context(context)
        network.train(training)
        try:
            outputs_of(network, images)
        except ValueError:
            if not training:
                raise
            return {}
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
        output = function(*args, **(kwargs or {}))
        chosen = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        if (name in BY_VALUE or chosen) and not self.training:
            raise UnreadableError(
                "The network's forward depends on values that it computes (an if on a tensor, or "
                f"{name.strip('_')}), so it can't be read from a few images."
            )
        if name in DRAWS and not self.training:
            raise UnreadableError(
                f"The network's forward draws random numbers in evaluation, too ({name}), so that "
                "no score would be the same twice: draw if self.training only."
            )
        if "dropout" in name:
            given = {"train": args[2] if len(args) > 2 else False, **(kwargs or {})}
            if not self.training and given.get("training", given["train"]):
                raise UnreadableError(
                    f"{name} drops in evaluation, too (write nn.Dropout, or "
                    "training=self.training)."
                )
            name = getattr(args[0], "_maker", "")
        if isinstance(output, Tensor):
            output._maker = name
        return output


def _graph(traced: nn.Module, images: Inputs, both: bool) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's graph of evaluation, or of ``both`` modes: then layers that are used in
    training alone are tied, too.
    """
    for layer in traced.modules():
        if getattr(layer, "inplace", False):  # on a view, it would take layers out of the graph
            layer.inplace = False
        # The graph sees parameters: make one's own buffers such
        for name, value in [*layer._buffers.items()]:
            if not isinstance(layer, NORMS) and value is not None and value.is_floating_point():
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(value))
    traced.requires_grad_()
    # A PReLU with one slope has no channels. As a layer of the graph it would tie those of all the
    # places where it is used, and the graph would take its slope for the maps.
    plain = [m for m in traced.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
    nn.ModuleList(plain).requires_grad_(False)
    own = {
        parameter: _axis_of(parameter)
        for layer in traced.modules()
        for parameter in layer.parameters(recurse=False)
        if not isinstance(layer, CONV | nn.Linear | NORMS)
    }
    inputs = [x.clone() for x in tree_leaves(images)]
    first = []
    for x in inputs:
        channels = x.is_floating_point() and x.dim() > 1
        first.append(_Images(x.shape[1], affine=False) if channels else nn.Identity())
        x.requires_grad_(x.is_floating_point())

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
    if parameter.dim() > 3:
        return 1 if len(parameter) == 1 < parameter.shape[1] else None
    if parameter.dim() == 3 and len(parameter) > 1:
        return 0
    longer = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    return longer[-1] if longer else None


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
        self.uses = Counter(
            value
            for layer in traced.modules()
            for value in (*layer._parameters.values(), *layer._buffers.values())
            if value is not None
        )
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

    def group(self, name: str, layer: nn.Module) -> tuple[Group, set[nn.Module]]:
        """The group of a layer's filters, and the layers whose channels are all in it."""
        if layer not in self.graph.module2node:
            raise _Obstacle(
                "no gradient comes back from the outputs to it: it runs under torch.no_grad(), in "
                "gradient checkpointing or before a detach() in forward, or its output isn't used"
            )
        size = getattr(layer, size_name(layer, "out"))
        found, owner = self._follow(self.graph.module2node[layer], size)
        operations = {_named(node) for node, _ in found if node.module not in self.names}
        passed = tuple(sorted(operations - HARMLESS))
        if any(isinstance(node.module, _OutputOp) for node, _ in found):
            taken = any(side == "in" and node.module in self.names for node, side in found)
            raise _Obstacle(IN_OUTPUTS + ", too" * taken)
        classes = sorted({owner(k) for k in range(size)})
        number = {k: i for i, k in enumerate(classes)}
        parts, together = [], set()
        for (node, side), known in found.items():
            if node.module in self.names:  # and not an operation
                channels = sorted(known)
                owners = torch.tensor([number[owner(known[c])] for c in channels])
                part = self._part(node, side, torch.tensor(channels), owners)
                if part is None or len(set(owners.bincount(minlength=len(classes)).tolist())) > 1:
                    raise _Obstacle(counts_on_them(passed))
                parts.append(part)
                together |= {node.module} if side == "out" else set()
        parts.sort(key=lambda part: (part.name != name, part.side == "in"))
        return Group(len(classes), tuple(parts), passed), together

    def _follow(self, root, size: int) -> tuple[dict[tuple, dict[int, int]], Callable[[int], int]]:
        """All (layer or operation, side) that the filters of ``root`` are tied to, with the filter
        that each channel there goes with; and which filter speaks for all that go together.
        """
        leader = list(range(size))

        def owner(k: int) -> int:
            while leader[k] != k:
                k = leader[k]
            return k

        found: dict[tuple, dict[int, int]] = {}

        def mixed(node) -> _Obstacle:
            for operation, _ in found:  # it may be one of several that a GRU, say, consists of
                for source in operation.inputs:
                    if isinstance(source.module, nn.Parameter):
                        self._check(source)
            return _Obstacle(f"{_named(node)} mixes them")

        stack = [(root, "out", [_HybridIndex(idx=k, root_idx=k) for k in range(size)])]
        while stack:
            node, side, pairs = stack.pop()
            if isinstance(node.module, CONV | nn.Linear) and side == "out":
                there = getattr(node.module, size_name(node.module, side))
                if size == 1 < there and not is_depthwise(node.module):
                    raise _Obstacle(ONE_MAP)
                if there == 1 < size:
                    continue  # its one map is multiplied with all of theirs
            self._check(node)
            known, new = found.setdefault((node, side), {}), []
            for pair in pairs:
                for channel in _tied(node.module, side, pair.idx):
                    if channel in known:
                        one, other = sorted((owner(known[channel]), owner(pair.root_idx)))
                        leader[other] = one
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
        return found, owner

    def _check(self, node) -> None:
        """Raise ``_Obstacle`` for what can't lose channels."""
        layer = node.module
        if isinstance(layer, _Images):
            raise _Obstacle("their maps are combined with the images")
        if node in self.broken:
            raise _Obstacle(f"{_named(node)} mixes them")
        if layer not in self.names:
            return
        name = self.names[layer]
        if isinstance(layer, nn.Parameter):
            name = name.rpartition(".")[0]
            layer = self.traced.get_submodule(name)
            known = not type(layer).__module__.startswith("torch.nn.")
        else:
            known = isinstance(layer, CONV | nn.Linear | NORMS)
        if not known:
            raise _Obstacle(f"{name} is a {type(layer).__name__}, which needs all of them")
        if any(self.uses[value] > 1 for value in layer.parameters(recurse=False)):
            raise _Obstacle(f"{name} shares a weight with another layer")
        if isinstance(node.module, CONV | nn.Linear | NORMS) and "weight" not in layer._parameters:
            raise _Obstacle(
                f"{name} has a weight that is computed from others (use remove_parametrizations)"
            )

    def _part(self, node, side: str, channels: Tensor, owners: Tensor) -> Part | None:
        """The part of a group that a layer or parameter is, None if these can't be its channels."""
        layer, name = node.module, self.names[node.module]
        if isinstance(layer, nn.Parameter):
            size = layer.shape[node.pruning_dim]
            part = Part(name, "", channels, owners, node.pruning_dim)
        else:
            size = getattr(layer, size_name(layer, side), 0)
            part = Part(name, side, channels, owners)
        return part if channels[-1] < size else None


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
