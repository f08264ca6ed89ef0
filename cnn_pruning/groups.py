"""Networks that aren't chains: filters that go together, scored by Eq. 8 and removed together.

Where feature maps are added, the filters that make them can only go together. The same holds for a
depthwise convolution and the convolution before it. Torch-Pruning finds these groups.

A group's filter is gone when every convolution or linear layer that takes its maps takes zeros
instead. So the gate of Eq. 2 stands at each of these inputs, and nowhere else. Then no path meets
the gate twice, as it would with gates on z and ReLU(z), or on x and x + f(x): between two gates
there is always a layer that mixes channels. And no batch norm stands between a closed gate and
the layer that takes the map, so that zero stays zero.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from cnn_pruning import operations
from cnn_pruning.data import batches
from cnn_pruning.passes import (
    Cost,
    copy_of,
    device_of,
    differentiable,
    evaluation,
    first_line,
    on_device,
    outputs_of,
    summed_loss,
)
from cnn_pruning.pruner import checked_filters
from cnn_pruning.ranks import own, summed
from cnn_pruning.scores import Filters, Scores, names_of, spare_filters
from cnn_pruning.tracing import check_network, layers_that_share

_CONV = nn.modules.conv._ConvNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_APART = _CONV | nn.Linear | _BATCH_NORM | nn.modules.instancenorm._InstanceNorm | nn.PReLU
_PASSIVE = [call for call, kind in operations.CALLS.items() if kind is operations.Kind.PASSIVE]
_PASSIVE += [pad, *operations.FLATTENS, *operations.RESHAPES, *operations.MEANS]
_PASSIVE += operations.SQUEEZES
_PASSIVE_NAMES = {getattr(call, "__name__", call) for call in _PASSIVE}


def group_scores(
    model: nn.Module,
    data: Dataset,
    batch_size: int = 128,
    cost: Cost | None = None,
    keep: Collection[str] = (),
) -> Scores:
    """Return the Taylor score of the filters of every group, by name of its first convolution.

    Score k is that of the convolution's filter k with all that can only go together with it. It is
    Eq. 8, where z are the values of all their maps and M is the number of these values: for each
    example |(1/M) sum z dC/dz|, summed over maps and positions, then the mean over the examples.
    The sum is the derivative with respect to one gate on all the maps. An M for each map would
    weight maps of different sizes differently, and the sum would no longer be that derivative.
    ``normalize`` takes the common M out again.

    A map is what a convolution or linear layer takes, before any pooling or flattening. Its
    gradient is the part that comes back through this layer, without the part that comes back along
    a skip connection. A group of one map has the scores of ``filter_scores``. Where a
    convolution of G groups (not a depthwise one) takes or makes the maps, score k is that of the
    filters k, k + K/G, k + 2K/G and so on, because each of the G groups must lose the same number.

    ``data``, ``batch_size``, ``cost`` and the result are as in ``filter_scores``. The groups are
    read from what the network computes for the first images. Left out are filters that are tied to
    channels of the images or of the outputs, and the groups named in ``keep``.

    Raises ``ImportError`` without Torch-Pruning, ``TypeError`` for groups that can't be removed
    exactly (this is tried out), and ``ValueError`` as ``filter_scores`` does.

    Source: Molchanov et al. 2017, Eq. 8, for the groups of Fang et al. 2023 (DepGraph).
    """
    network = _Network(model, data)
    keep = names_of(keep)
    spare = spare_filters(network.filters(), keep=keep)
    groups = {name: group for name, group in network.groups.items() if name not in keep}
    network.without({name: list(range(0, spare[name], 3)) for name in groups})  # can they go?
    weight = next(model.parameters())
    totals = {name: torch.zeros(g.filters, dtype=torch.float64) for name, g in groups.items()}
    for images, labels in batches(data, batch_size) if groups else ():
        with torch.inference_mode(False), torch.enable_grad(), evaluation(model):
            gates = [  # for each example, so that each has its own derivative
                weight.new_ones(len(images), len(total), requires_grad=True)
                for total in totals.values()
            ]
            with network.gated(dict(zip(groups, gates, strict=True))):
                outputs = outputs_of(model, on_device(images, weight.device))
                loss = summed_loss(outputs, on_device(labels, weight.device), cost)
            with differentiable(loss):
                slopes = torch.autograd.grad(loss, gates)
        for total, slope in zip(totals.values(), slopes, strict=True):
            total += slope.abs().cpu().sum(0, dtype=torch.float64)
    totals = summed(data, model, totals)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {
        name: (totals[name] / len(data) / group.values).to(dtype) for name, group in groups.items()
    }


@contextmanager
def mask_groups(
    model: nn.Module, filters: Mapping[str, Iterable[int]], data: Dataset
) -> Iterator[nn.Module]:
    """Force the maps of ``filters``, and of all that goes with them, to zero for the block.

    Arguments and errors are those of ``remove_groups``, except that a whole group can be masked.
    """
    network = _Network(model, data)
    with network.gated(network.closed(checked_filters(network, filters))):
        yield model


def remove_groups(
    model: nn.Module, filters: Mapping[str, Iterable[int]], data: Dataset
) -> nn.Module:
    """Return a copy of ``model`` without ``filters`` and all that can only go with them.

    ``filters`` maps the names in ``group_scores`` to indices; ``model`` itself is untouched. In
    evaluation mode the copy's outputs equal those of ``model`` with the same filters masked. This
    is checked on the first images of ``data``, from which the groups are read as well.

    Raises ``ImportError``, ``TypeError`` as ``group_scores``, ``ValueError`` as ``remove_filters``.
    """
    network = _Network(model, data)
    removed = checked_filters(network, filters)
    for name, gone in removed.items():
        if len(gone) == network.groups[name].filters:
            raise ValueError(
                f"{name} would lose all of its {len(gone)} filters: leave at least one."
            )
    return network.without(removed)


@dataclass
class _Group:
    """Filters that can go, and where. The owner of a channel is the filter that it goes with."""

    filters: int
    cuts: list[tuple[str, Callable, Tensor, Tensor]]
    """(name of a layer or parameter, what cuts it, its channels, their owners)."""
    inputs: dict[str, tuple[Tensor, Tensor]]
    """(channels, their owners), by name of each layer that takes the maps."""
    values: float = 0
    """How many values of an example one gate multiplies."""
    refusal: str = ""
    """Why these filters can't be removed exactly, if that is known."""


class _Network:
    """A network, its groups by name in the order of use, and images to try it on."""

    def __init__(self, model: nn.Module, data: Dataset) -> None:
        check_network(model)
        self.model = model
        with torch.inference_mode(False), torch.enable_grad():
            self.images = on_device(next(iter(batches(own(data), 2)))[0], device_of(model))
            self.groups = _read(copy_of(model).eval().requires_grad_(), self.images)

    def filters(self) -> dict[str, int]:
        return {name: group.filters for name, group in self.groups.items()}

    def without(self, filters: Filters) -> nn.Module:
        """A copy without ``filters``, or a ``TypeError`` if it doesn't equal the masked network."""
        filters = {name: gone for name, gone in filters.items() if gone}
        small, why = self._try(filters)
        if why:
            alone = [name for name, gone in filters.items() if self._try({name: gone})[1]]
            refused = alone or list(filters)
            raise TypeError(
                f"{', '.join(refused)} can't lose these filters: {why}. Leave them alone, with "
                f"keep={refused}."
            )
        return small

    def _try(self, filters: Filters) -> tuple[nn.Module | None, str]:
        why = next((self.groups[name].refusal for name in filters if self.groups[name].refusal), "")
        if why:
            return None, why
        try:
            small = self._cut(filters)
            same = self._is_masked(small, filters)
            return small, "" if same else "something behind them uses several channels at once"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return None, f"something behind them counts on their number ({first_line(error)})"

    def _cut(self, filters: Filters) -> nn.Module:
        cuts: dict[tuple[str, str], tuple[Callable, set]] = {}
        for name, gone in filters.items():
            for layer, cut, channels, owners in self.groups[name].cuts:
                lost = channels[torch.isin(owners, torch.tensor(gone))].tolist()
                cuts.setdefault((layer, cut.__name__), (cut, set()))[1].update(lost)
        with torch.inference_mode(False):
            small = copy_of(self.model)
            small.zero_grad()
            for (layer, _), (cut, lost) in cuts.items():  # a layer's channels go at once
                parent, _, last = layer.rpartition(".")
                parent = small.get_submodule(parent)
                setattr(parent, last, cut(getattr(parent, last), sorted(lost)))
            for new, old in zip(small.parameters(), self.model.parameters(), strict=True):
                new.requires_grad_(old.requires_grad)  # Torch-Pruning makes new ones
                if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
                    new.data = new.data.contiguous(memory_format=torch.channels_last)
        return small

    def _is_masked(self, small: nn.Module, filters: Filters) -> bool:
        with torch.no_grad(), evaluation(self.model), evaluation(small):
            with self.gated(self.closed(filters)):
                masked = _tensors(self.model(self.images))
            return all(map(_close, _tensors(small(self.images)), masked))

    def closed(self, filters: Filters) -> dict[str, Tensor]:
        """Gates of 0 for ``filters``, and of 1 for the others of their groups."""
        weight = next(self.model.parameters())
        gates = {name: weight.new_ones(1, self.groups[name].filters) for name in filters}
        for name, gone in filters.items():
            gates[name][:, gone] = 0
        return gates

    @contextmanager
    def gated(self, gates: dict[str, Tensor]) -> Iterator[None]:
        """Multiply the maps of each group by its gates, (examples or 1, filters)."""
        inputs: dict[str, list] = {}
        for name, gate in gates.items():
            for layer, places in self.groups[name].inputs.items():
                inputs.setdefault(layer, []).append((gate, *places))
        with ExitStack() as stack:
            if any(module._compiled_call_impl for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for layer, gated in inputs.items():
                handle = self.model.get_submodule(layer).register_forward_pre_hook(_gate(gated))
                stack.callback(handle.remove)
            yield


def _gate(gated: list[tuple[Tensor, Tensor, Tensor]]) -> Callable:
    def hook(layer: nn.Module, inputs: tuple) -> tuple:
        x, *rest = inputs
        axis = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
        factors = x.new_ones(len(gated[0][0]), x.shape[axis])
        for gate, channels, owners in gated:  # several groups' maps may be concatenated
            values = gate[:, owners.to(x.device)].to(x.dtype)
            factors = factors.index_copy(1, channels.to(x.device), values)
        shape = [1] * x.dim()
        shape[0], shape[axis] = factors.shape
        return x * factors.reshape(shape), *rest

    return hook


def _close(removed: Tensor, masked: Tensor) -> bool:
    # Rounding is far below this, and a channel too many or too few far above.
    tolerance = torch.finfo(masked.dtype).eps ** 0.5 * masked.nan_to_num().abs().max()
    return removed.shape == masked.shape and torch.allclose(
        removed, masked, rtol=0, atol=tolerance, equal_nan=True
    )


def _tensors(outputs: object) -> list[Tensor]:
    found = _torch_pruning().utils.flatten_as_list(outputs)
    return [output for output in found if isinstance(output, Tensor) and output.is_floating_point()]


def _torch_pruning():
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "Networks that aren't chains need Torch-Pruning: pip install 'cnn-pruning[graph]'."
        ) from error
    return torch_pruning


class _Images(_BATCH_NORM):
    """The images as a layer: without it, the graph wouldn't know what is tied to their channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clone()


def _read(traced: nn.Module, images: Tensor) -> dict[str, _Group]:
    """The groups of ``traced``, a copy that may be changed."""
    library = _torch_pruning()
    maps = _maps(traced, images)
    # A PReLU with one slope has no channels. As a layer of the graph it would tie those of all the
    # places where it is used, and the graph would take its slope for the maps.
    plain = [m for m in traced.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
    nn.ModuleList(plain).requires_grad_(False)
    try:
        graph = library.DependencyGraph().build_dependency(
            nn.Sequential(_Images(images.shape[1], affine=False), traced),
            images.clone().requires_grad_(images.is_floating_point()),  # for frozen layers
            # Only outputs that aren't a layer's are marked as the network's, so here are clones.
            forward_fn=lambda whole, x: [out.clone() for out in _tensors(whole(x))],
            ignored_layers=plain,
            verbose=False,
        )
    except Exception as error:
        raise TypeError(f"Torch-Pruning can't read {type(traced).__name__} ({error}).") from error
    groups, seen = {}, set()
    for name in maps:  # in the order of use
        conv = traced.get_submodule(name)
        if not isinstance(conv, _CONV) or conv in seen:
            continue
        if conv not in graph.module2node:
            raise TypeError(
                f"No gradient comes back from the outputs to {name}: it runs under "
                "torch.no_grad() or before a detach() in forward, or its output isn't used."
            )
        cut = graph.get_pruner_of_module(conv).prune_out_channels
        found = graph.get_pruning_group(conv, cut, range(conv.out_channels))
        tied = [
            i.dep.target.module for i in found if graph.is_out_channel_pruning_fn(i.dep.handler)
        ]
        seen.update(tied)
        if not any(isinstance(module, _Images | library.ops._OutputOp) for module in tied):
            groups[name] = _group(name, found, graph, traced, maps)
    if not seen:
        raise TypeError(f"{type(traced).__name__} has no convolution whose filters could go.")
    return groups


def _group(name: str, found, graph, traced: nn.Module, maps: dict) -> _Group:
    library = _torch_pruning()
    names = {layer: layer_name for layer_name, layer in traced.named_modules()}
    names |= {parameter: its_name for its_name, parameter in traced.named_parameters()}
    nodes = [item.dep.target for item in found]
    shared = layers_that_share(traced)
    shares = [node.module.groups for node in nodes if node.type == library.ops.OPTYPE.CONV]
    group = _Group(len(found[0].idxs) // math.lcm(*shares), [], {})
    counted = set()
    for item, node in zip(found, nodes, strict=True):
        if node.module not in names:  # an operation
            continue
        layer, cut = names[node.module], item.dep.handler
        channels, owners = torch.tensor(item.idxs), torch.tensor(item.root_idxs) % group.filters
        if not graph.is_out_channel_pruning_fn(cut):
            group.inputs[layer] = channels, owners
            for z, values in maps[layer]:
                if id(z) not in counted:  # one map may go into several layers
                    group.values += values * len(channels) / group.filters
                counted.add(id(z))
        if isinstance(node.module, nn.Parameter):
            pruner = library.pruner.function.ParameterPruner(node.pruning_dim)
            cut = pruner.prune_out_channels
        elif not isinstance(node.module, _APART):
            kind = type(node.module).__name__
            group.refusal = f"{layer} is a {kind}, which uses several channels at once"
        elif node.module in shared:
            group.refusal = f"{layer} shares a weight with another layer"
        elif "weight" not in node.module._parameters:
            group.refusal = f"{layer} has a weight that is computed from others"
        elif isinstance(node.module, _BATCH_NORM) and not node.module.track_running_stats:
            group.refusal = f"{layer} is a batch norm without running statistics"
        group.cuts.append((layer, cut, channels, owners))
    return group


class _Origins(TorchFunctionMode):
    """Remembers which tensors pooling and flattening were applied to."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if isinstance(output, Tensor):
            if getattr(function, "__name__", "") in _PASSIVE_NAMES:
                values = (*args, *kwargs.values(), output)
                first = next(value for value in values if isinstance(value, Tensor))
                self.origins[id(output)] = output, self.of(first)  # kept: its id isn't used again
            else:
                self.origins.pop(id(output), None)
        return output

    def of(self, tensor: Tensor) -> Tensor:
        return self.origins.get(id(tensor), (tensor, tensor))[1]


def _maps(traced: nn.Module, images: Tensor) -> dict[str, list[tuple[Tensor, float]]]:
    """(map, its number of values for a channel), by name of the layer that takes it, as used."""
    maps: dict[str, list[tuple[Tensor, float]]] = {}
    with ExitStack() as stack:
        origins = _Origins()
        for name, layer in traced.named_modules():
            if isinstance(layer, _CONV | nn.Linear):

                def record(layer: nn.Module, inputs: tuple, name: str = name) -> None:
                    z = origins.of(inputs[0])
                    channels = layer.in_channels if isinstance(layer, _CONV) else layer.in_features
                    maps.setdefault(name, []).append((z, z.numel() / len(z) / channels))

                stack.callback(layer.register_forward_pre_hook(record).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(origins)
        outputs_of(traced, images)
    return maps
