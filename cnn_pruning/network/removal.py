"""How filters leave a network: the channels of each layer that go with them are cut out."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from cnn_pruning.network.description import CONV, Filters, Group, Network
from cnn_pruning.network.passes import copy_of


def remove(network: Network, filters: Filters) -> Network:
    """Return a copy of the network without ``filters``, and its description.

    Raises ``ValueError`` if a group would lose all its filters.
    """
    lost: dict[tuple[str, str, int], list[Tensor]] = {}
    for name, gone in filters.items():
        if gone and len(gone) == network.groups[name].filters:
            raise ValueError(
                f"{name} would lose all of its {len(gone)} filters: leave at least one."
            )
        for part in network.groups[name].parts if gone else ():
            channels = part.channels[torch.isin(part.owners, torch.tensor(gone))]
            lost.setdefault(part.place(), []).append(channels)
    with torch.inference_mode(False):  # else the copy couldn't be trained
        model = copy_of(network.model)
        kept = {  # a layer's channels go at once, whatever group they are of
            place: _cut(model, *place, torch.cat(channels)) for place, channels in lost.items()
        }
    groups = {
        name: _renumbered(group, filters.get(name, []), kept)
        for name, group in network.groups.items()
    }
    return replace(network, model=model, groups=groups)


def _renumbered(group: Group, gone: list[int], kept: dict[tuple, Tensor]) -> Group:
    """The group without the filters ``gone``, whose parts have ``kept`` those channels."""
    stays = torch.ones(group.filters, dtype=torch.bool)
    stays[gone] = False
    number = stays.cumsum(0) - 1
    parts = []
    for part in group.parts:
        if part.place() in kept:
            here = stays[part.owners]
            channels = torch.searchsorted(kept[part.place()], part.channels[here])
            part = replace(part, channels=channels, owners=number[part.owners[here]])
        parts.append(part)
    return Group(int(stays.sum()), tuple(parts), group.passed)


def _cut(model: nn.Module, name: str, side: str, axis: int, lost: Tensor) -> Tensor:
    """Cut the channels ``lost`` out of a layer or parameter; return those that are left."""
    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(name if side else parent)
    size = getattr(layer, size_name(layer, side)) if side else getattr(layer, last).shape[axis]
    stays = torch.ones(size, dtype=torch.bool)
    stays[lost] = False
    kept = stays.nonzero().flatten()
    if not side:  # a parameter or a buffer
        _keep(layer, last, axis, kept)
        return kept
    if isinstance(layer, CONV | nn.Linear):
        if is_depthwise(layer):
            layer.in_channels = layer.groups = len(kept)
            _keep(layer, "weight", 0, kept)
        elif (side == "out") != getattr(layer, "transposed", False):
            _keep(layer, "weight", 0, kept)
        else:  # this axis has the channels of one group, and all groups lose the same
            _keep(layer, "weight", 1, kept[kept < size // getattr(layer, "groups", 1)])
        if side == "out":
            _keep(layer, "bias", 0, kept)
    else:
        if isinstance(layer, nn.GroupNorm):  # whole groups go
            layer.num_groups = layer.num_groups * len(kept) // size
        for values in ("weight", "bias", "running_mean", "running_var"):
            _keep(layer, values, 0, kept)
    setattr(layer, size_name(layer, side), len(kept))
    return kept


def size_name(layer: nn.Module, side: str) -> str:
    """The attribute that has the number of channels that a layer takes ("in") or puts out."""
    names = {CONV: f"{side}_channels", nn.Linear: f"{side}_features"}
    names |= {nn.GroupNorm: "num_channels", nn.PReLU: "num_parameters"}
    return next((name for kind, name in names.items() if isinstance(layer, kind)), "num_features")


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
