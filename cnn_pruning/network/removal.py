"""How filters leave a network: the channels of each layer that go with them are cut out."""

import torch
from torch import Tensor, nn

from cnn_pruning.network.description import CONV, Filters, Group, Network, Part
from cnn_pruning.network.passes import copy_of

ALONG_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def remove(network: Network, filters: Filters) -> Network:
    """Return a copy of the network without ``filters``, and its description.

    Raises ``ValueError`` if a group would lose all its filters.
    """
    for name, gone in filters.items():
        if gone and len(gone) == network.groups[name].filters:
            raise ValueError(
                f"{name} would lose all of its {len(gone)} filters: leave at least one."
            )
    kept: dict[tuple[str, str], Tensor] = {}
    with torch.inference_mode(False):  # else the copy couldn't be trained
        model = copy_of(network.model)
        lost: dict[tuple[str, str], list[tuple[Part, Tensor]]] = {}
        for name, gone in filters.items():
            for part in network.groups[name].parts if gone else ():
                channels = part.channels[torch.isin(part.owners, torch.tensor(gone))]
                lost.setdefault((part.name, part.side), []).append((part, channels))
        for place, found in lost.items():  # a layer's channels go at once
            part = found[0][0]
            kept[place] = _cut(model, part, torch.cat([channels for _, channels in found]))
    groups = {
        name: _renumbered(group, filters.get(name, []), kept)
        for name, group in network.groups.items()
    }
    return Network(model, groups, network.left_out, network.softmax, network.images)


def _renumbered(group: Group, gone: list[int], kept: dict[tuple[str, str], Tensor]) -> Group:
    """The group without the filters ``gone``, whose parts have ``kept`` those channels."""
    stays = torch.ones(group.filters, dtype=torch.bool)
    stays[gone] = False
    number = stays.cumsum(0) - 1
    parts = []
    for part in group.parts:
        channels, owners = part.channels, part.owners
        if (part.name, part.side) in kept:
            here = stays[owners]
            channels = torch.searchsorted(kept[part.name, part.side], channels[here])
            owners = number[owners[here]]
        parts.append(Part(part.name, part.side, channels, owners, part.axis))
    return Group(int(stays.sum()), tuple(parts))


def _cut(model: nn.Module, part: Part, lost: Tensor) -> Tensor:
    """Cut the channels ``lost`` out of a layer or parameter; return those that are left."""

    def others(size: int) -> Tensor:
        stays = torch.ones(size, dtype=torch.bool)
        stays[lost] = False
        return stays.nonzero().flatten()

    if not part.side:  # a parameter or a buffer
        parent, _, last = part.name.rpartition(".")
        parent = model.get_submodule(parent)
        kept = others(getattr(parent, last).shape[part.axis])
        _keep(parent, last, part.axis, kept)
        return kept
    layer = model.get_submodule(part.name)
    if isinstance(layer, nn.Linear):
        kept = others(layer.in_features if part.side == "in" else layer.out_features)
        _keep(layer, "weight", int(part.side == "in"), kept)
        if part.side == "in":
            layer.in_features = len(kept)
        else:
            _keep(layer, "bias", 0, kept)
            layer.out_features = len(kept)
    elif isinstance(layer, CONV):
        kept = others(layer.in_channels if part.side == "in" else layer.out_channels)
        _cut_conv(layer, part.side, kept)
    else:
        size = {nn.GroupNorm: "num_channels", nn.PReLU: "num_parameters"}.get(type(layer))
        size = size or "num_features"
        old = getattr(layer, size)
        kept = others(old)
        if isinstance(layer, nn.GroupNorm):  # whole groups of channels go
            layer.num_groups = layer.num_groups * len(kept) // old
        for name in ALONG_CHANNELS:
            _keep(layer, name, 0, kept)
        setattr(layer, size, len(kept))
    return kept


def _cut_conv(conv: nn.Module, side: str, kept: Tensor) -> None:
    depthwise = is_depthwise(conv)
    first = (side == "out") != conv.transposed  # the axis that has the channels of all groups
    size = conv.in_channels if side == "in" else conv.out_channels
    if first or depthwise:
        _keep(conv, "weight", 0, kept)
    else:  # each of the groups loses the same
        _keep(conv, "weight", 1, kept[kept < size // conv.groups])
    if side == "in":
        conv.in_channels = len(kept)
        return
    _keep(conv, "bias", 0, kept)
    conv.out_channels = len(kept)
    if depthwise:
        conv.in_channels = conv.groups = len(kept)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution with one filter for each of its channels."""
    return isinstance(layer, CONV) and layer.groups == layer.in_channels == layer.out_channels > 1


def _keep(layer: nn.Module, name: str, axis: int, kept: Tensor) -> None:
    old = getattr(layer, name, None)
    if old is None:
        return
    values = old.detach().index_select(axis, kept.to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(layer, name, values)
