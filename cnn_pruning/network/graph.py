"""Any other network, read from what it computes for a few images, by Torch-Pruning's graph.

The graph says which channels of which layer each channel is tied to. Here they are followed from
each convolution until nothing new is found. Filters that meet in one channel can only go together.

Source: the dependency graph of Fang et al. 2023 (arXiv 2301.12900).
"""

import re
import warnings
from collections.abc import Iterable
from contextlib import ExitStack

import torch
import torch_pruning
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch_pruning.dependency import index_mapping
from torch_pruning.ops import OPTYPE, _OutputOp

from cnn_pruning.network.checks import first_line
from cnn_pruning.network.description import BATCH_NORM, CONV, IN_OUTPUTS, Group, Part
from cnn_pruning.network.passes import Inputs, UnreadableError, outputs_of, training_flags
from cnn_pruning.network.removal import is_depthwise

MAPPINGS = {
    OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
    OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
    OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
    OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
    OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
    OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
}
NORMS = BATCH_NORM | nn.modules.instancenorm._InstanceNorm | nn.PReLU | nn.GroupNorm
HARMLESS = set(
    """add sub mul div pow exp neg abs sqrt rsqrt relu threshold sigmoid hardsigmoid hardswish silu
    gelu elu leaky_relu hardtanh softplus mish tanh log_sigmoid clamp clamp_min mean cat clone
    max_pool2d_with_indices max_pool1d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d
    upsample_nearest2d upsample_bilinear2d constant_pad_nd squeeze unsqueeze native_dropout
    bernoulli native_batch_norm cudnn_batch_norm t alias""".split()
)


class _Obstacle(Exception):
    """Why the filters that are being followed can't go."""


class _Images(BATCH_NORM):
    """The images as a layer: without it, the graph wouldn't know what is tied to their channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clone()


class _Whole(nn.Module):
    def __init__(self, network: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        images = [x.dim() > 1 and x.is_floating_point() for x in inputs]
        self.images = nn.ModuleList(
            _Images(x.shape[1], affine=False) if image else nn.Identity()
            for x, image in zip(inputs, images, strict=True)
        )
        self.network = network

    def forward(self, inputs: list[Tensor]) -> object:
        inputs = [layer(x) for layer, x in zip(self.images, inputs, strict=True)]
        return outputs_of(self.network, inputs)


def read_graph(traced: nn.Module, images: Inputs) -> tuple[dict[str, Group], dict[str, str]]:
    """Return the groups of ``traced``, a copy that may be changed, and why others can't go."""
    inputs = [x.clone() for x in tree_leaves(images)]
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    evaluated, trained = (makers(traced, images, mode) for mode in (False, True))
    for name in evaluated.keys() & trained.keys():
        if evaluated[name] and evaluated[name] != trained[name] != "":
            raise TypeError(
                f"In training, {name} takes what {trained[name]} puts out, but in evaluation what "
                f"{evaluated[name]} does: only dropout and batch norm may differ."
            )
    modes = [False, True] if trained.keys() - evaluated.keys() else [False]
    _register_buffers(traced)
    traced.requires_grad_()
    # A PReLU with one slope has no channels. As a layer of the graph it would tie those of all the
    # places where it is used, and the graph would take its slope for the maps.
    plain = [m for m in traced.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
    nn.ModuleList(plain).requires_grad_(False)

    def forward(whole: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        found = []
        for mode in modes:  # layers that are used in training alone are tied, too
            whole.train(mode)
            found += [y for y in floats_in(whole(inputs)) if y.grad_fn is not None]
        # Only outputs that aren't a layer's are marked as the network's, so here are clones.
        return [output.clone() for output in found]

    names = {layer: name for name, layer in traced.named_modules()}
    names |= {parameter: name for name, parameter in traced.named_parameters()}
    own = [(p, _axis_of(p)) for name, p in traced.named_parameters() if _is_own(traced, name)]
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                _Whole(traced, inputs),
                inputs,
                forward_fn=forward,
                unwrapped_parameters=[(p, axis) for p, axis in own if axis is not None],
                ignored_layers=plain,
                verbose=False,
            )
        except Exception as error:  # often of one operation that it can't map: see below
            if not hasattr(graph, "module2node"):
                raise TypeError(
                    f"{type(traced).__name__} can't be read ({first_line(error)})."
                ) from error
        for node in graph.module2node.values():
            if "Checkpoint" in (node.grad_fn.name() if node.grad_fn is not None else ""):
                raise TypeError(
                    f"{type(traced).__name__} uses gradient checkpointing with use_reentrant=True, "
                    "behind which nothing can be read: switch it off."
                )
        broken = {node for node in graph.module2node.values() if not _mapped(graph, node)}
    reader = _Reader(traced, graph, names, broken)
    groups, left_out, seen = {}, {}, set()
    for name in dict.fromkeys((*evaluated, *trained)):
        layer = traced.get_submodule(name)
        if not isinstance(layer, CONV | nn.Linear) or layer in seen:
            continue
        seen.add(layer)
        try:
            groups[name], together = reader.group(name, layer)
            seen |= together
        except _Obstacle as obstacle:
            left_out[name] = str(obstacle)
    return groups, left_out


def _mapped(graph, node) -> bool:
    """Whether Torch-Pruning can say what an operation does to channels."""
    update = MAPPINGS.get(node.type)
    try:
        if update:
            update(graph, node)
        return True
    except Exception:
        return False


def makers(network: nn.Module, images: Inputs, training: bool) -> dict[str, str]:
    """The names of the layers without layers inside, in the order of use, and what function, but
    dropout, made what each takes.

    In training, a network that can't take these few images uses none.
    """
    used: dict[str, str] = {}
    with ExitStack() as stack:
        for name, layer in network.named_modules():
            if not any(layer.children()):

                def record(_: nn.Module, inputs: tuple, name: str = name) -> None:
                    used.setdefault(name, getattr(next(iter(inputs), None), "_maker", ""))

                stack.callback(layer.register_forward_pre_hook(record).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(training_flags(network))
        stack.enter_context(_Makers(training))
        network.train(training)
        try:
            outputs_of(network, images)
        except ValueError:
            if not training:
                raise
            return {}
    return used


class _Makers(TorchFunctionMode):
    """Notes on each tensor what function made it. In evaluation, dropout and what depends on the
    values in a tensor are errors: for other images, something else might be computed.
    """

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        output = function(*args, **(kwargs or {}))
        if name in ("__bool__", "__int__", "__float__", "item") and not self.training:
            raise UnreadableError(
                "The network's forward depends on values that it computes (an if, or "
                f"{name.strip('_')}, of a tensor), so it can't be read from a few images."
            )
        if "dropout" in name:
            if not self.training and (kwargs or {}).get("training"):
                raise UnreadableError(
                    f"{name} drops in evaluation, too (write nn.Dropout, or "
                    "training=self.training)."
                )
            name = getattr(args[0], "_maker", "")
        if isinstance(output, Tensor):
            output._maker = name
        return output


class _Reader:
    """Follows the channels of one convolution through the graph."""

    def __init__(self, traced: nn.Module, graph, names: dict, broken: dict) -> None:
        self.traced, self.graph, self.names, self.broken = traced, graph, names, broken
        sizes = [size for p in traced.parameters() for size in p.shape]
        self.most = 2 * max(sizes, default=0)  # more channels are a sign of a misread operation
        owners: dict[Tensor, list[nn.Module]] = {}
        for layer in traced.modules():
            for value in (*layer._parameters.values(), *layer._buffers.values()):
                if value is not None:
                    owners.setdefault(value, []).append(layer)
        self.shared = {m for layers in owners.values() if len(layers) > 1 for m in layers}

    def group(self, name: str, layer: nn.Module) -> tuple[Group, set[nn.Module]]:
        """The group of a convolution's filters, and the layers whose channels are all in it."""
        node = self.graph.module2node.get(layer)
        if node is None:
            raise _Obstacle(
                "no gradient comes back from the outputs to it: it runs under torch.no_grad(), in "
                "gradient checkpointing or before a detach() in forward, or its output isn't used"
            )
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        found, owner = self._follow(node, size)
        if any(isinstance(node.module, _OutputOp) for node, _ in found):
            taken = any(side == "in" and node.module in self.names for node, side in found)
            raise _Obstacle(IN_OUTPUTS + ", too" * taken)
        passed = {self._named(node) for node, _ in found if node.module not in self.names}
        passed = tuple(sorted(passed - HARMLESS))
        classes = sorted({owner(k) for k in range(size)})
        number = {k: i for i, k in enumerate(classes)}
        parts, together = [], set()
        for (node, side), channels in found.items():
            part = self._part(node, side, sorted(channels), passed)
            if part is None:  # an operation
                continue
            owners = torch.tensor([number[owner(channels[c])] for c in part.channels.tolist()])
            if len(set(torch.bincount(owners, minlength=len(classes)).tolist())) > 1:
                raise _Obstacle(counts_on_them(passed))
            parts.append(Part(part.name, part.side, part.channels, owners, part.axis))
            if side == "out":
                together.add(node.module)
        parts.sort(key=lambda part: (part.name != name, part.side == "in"))
        return Group(len(classes), tuple(parts), passed), together

    def _follow(self, root, size: int):
        """All (node, side) that are tied to the channels of ``root``, and who owns each channel."""
        leader = list(range(size))

        def owner(k: int) -> int:
            while leader[k] != k:
                leader[k] = leader[leader[k]]
                k = leader[k]
            return k

        index = torch_pruning._helpers._HybridIndex
        found: dict[tuple, dict[int, int]] = {}
        stack = [(root, "out", [index(idx=k, root_idx=k) for k in range(size)])]
        while stack:
            node, side, pairs = stack.pop()
            known = found.setdefault((node, side), {})
            tied = self._tied(node, side)
            new = []
            for pair in pairs:
                for channel in tied(pair.idx):
                    if channel in known:
                        one, other = sorted((owner(known[channel]), owner(pair.root_idx)))
                        leader[other] = one
                    else:
                        known[channel] = pair.root_idx
                        new.append(index(idx=channel, root_idx=pair.root_idx))
            if len(known) > self.most:
                raise _Obstacle(f"{self._named(node)} mixes them")
            if not new:
                continue
            self._check(node)
            pruner = self.graph.get_pruner_of_module(node.module)
            trigger = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
            for dependency in node.dependencies:
                if dependency.is_triggered_by(trigger):
                    pairs = new
                    try:
                        for mapping in dependency.index_mapping:
                            pairs = mapping(pairs) if mapping is not None else pairs
                    except IndexError:
                        raise _Obstacle(f"{self._named(node)} mixes them") from None
                    if pairs:
                        out = self.graph.is_out_channel_pruning_fn(dependency.handler)
                        stack.append((dependency.target, "out" if out else "in", pairs))
        return found, owner

    def _tied(self, node, side: str):
        """What channels of a layer must go together, as a function of one of them."""
        layer = node.module
        if isinstance(layer, CONV) and layer.groups > 1 and not is_depthwise(layer):
            size = layer.out_channels if side == "out" else layer.in_channels
            each = size // layer.groups  # each of the groups must lose the same
            return lambda channel: range(channel % each, size, each)
        if isinstance(layer, nn.GroupNorm):
            each = layer.num_channels // layer.num_groups
            return lambda channel: range(channel - channel % each, channel - channel % each + each)
        return lambda channel: (channel,)

    def _check(self, node) -> None:
        """Raise ``_Obstacle`` for what can't lose channels."""
        layer = node.module
        if isinstance(layer, _Images):
            raise _Obstacle("their maps are added to the images")
        if node in self.broken:
            raise _Obstacle(f"{self._named(node)} mixes them")
        if not isinstance(layer, nn.Module) or layer not in self.names:
            return
        name, kind = self.names[layer], type(layer).__name__
        if not isinstance(layer, CONV | nn.Linear | NORMS):
            raise _Obstacle(f"{name} is a {kind}, which uses several channels at once")
        if layer in self.shared:
            raise _Obstacle(f"{name} shares a weight with another layer")
        if hasattr(layer, "parametrizations") or "weight" not in layer._parameters:
            raise _Obstacle(
                f"{name} has a weight that is computed from others (use remove_parametrizations)"
            )

    def _part(self, node, side: str, channels: list[int], passed: tuple[str, ...]) -> Part | None:
        layer = node.module
        if layer not in self.names:
            return None
        name, owners = self.names[layer], torch.empty(0)
        if isinstance(layer, nn.Parameter):
            parent = self.traced.get_submodule(name.rpartition(".")[0])
            if type(parent).__module__.startswith("torch.nn."):
                raise _Obstacle(f"{self.names[parent]} is a {type(parent).__name__}")
            size, side = layer.shape[node.pruning_dim], ""
        elif isinstance(layer, NORMS):
            size = len(next(iter(layer.parameters()), channels))
        elif isinstance(layer, nn.Linear):
            size = layer.in_features if side == "in" else layer.out_features
        else:
            size = layer.in_channels if side == "in" else layer.out_channels
        if channels[-1] >= size or (side != "in" and len(channels) < size):
            raise _Obstacle(counts_on_them(passed))
        return Part(name, side, torch.tensor(channels), owners, node.pruning_dim if not side else 0)

    def _named(self, node) -> str:
        return operation(node.grad_fn) if node.grad_fn is not None else "an operation"


def counts_on_them(passed: Iterable[str]) -> str:
    """Why filters can't go whose maps pass these operations, if their number stands in one."""
    said = f"{' or '.join(sorted(passed)) or 'something'} behind them counts on their number"
    return said + " (write torch.flatten(x, 1) instead of a fixed width)" * ("view" in passed)


def operation(grad_fn: object) -> str:
    """The operation that made a tensor, by the name that PyTorch's users know."""
    name = re.sub(r"Backward\d*$", "", grad_fn.name().rpartition("::")[2])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().removeprefix("unsafe_")


def _is_own(network: nn.Module, name: str) -> bool:
    """Whether a parameter is one of the user's own, and not of a layer that the graph knows."""
    return not isinstance(network.get_submodule(name.rpartition(".")[0]), CONV | nn.Linear | NORMS)


def _axis_of(parameter: Tensor) -> int | None:
    """The axis that holds channels: axis 1 of (1, C, H, W), else the last that is longer than 1."""
    longer = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    if parameter.dim() == 4 and len(parameter) == 1 and parameter.shape[1] > 1:
        return 1
    return longer[-1] if longer else None


def _register_buffers(network: nn.Module) -> None:
    """Make buffers of the user's own layers parameters, so that the graph sees them."""
    for layer in network.modules():
        if isinstance(layer, BATCH_NORM | nn.modules.instancenorm._InstanceNorm):
            continue
        for name, value in list(layer._buffers.items()):
            if value is not None and value.is_floating_point():
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(value))


def floats_in(outputs: object) -> list[Tensor]:
    """The floating-point tensors that a network puts out, in tuples, dictionaries or an object."""
    found = []
    for value in tree_leaves(outputs):
        if isinstance(value, Tensor):
            found += [value] if value.is_floating_point() else []
        elif hasattr(value, "__dict__"):
            found += floats_in(list(vars(value).values()))
    return found
