"""What pruning has to know about a network: which filters go together, and what goes with them."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor, nn

from cnn_pruning.network.checks import index, shown
from cnn_pruning.network.passes import Inputs

Filters = dict[str, list[int]]
"""Indices of filters, by name of group."""

IN_OUTPUTS = "their maps are in the network's outputs"
ONE_MAP = "its one map is multiplied with others"

CONV = nn.modules.conv._ConvNd
BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Part:
    """Channels of one layer or parameter, and the filter that each of them goes with."""

    name: str
    side: str
    """Of a layer: "out", or "in", where it takes the feature maps. Of a parameter: ""."""
    channels: Tensor
    owners: Tensor
    axis: int = 0
    """Where the channels are, in a parameter that isn't a layer's."""

    def place(self) -> tuple[str, str, int]:
        return self.name, self.side, self.axis


@dataclass(frozen=True)
class Group:
    """Filters that can only go together: filter k is all that filter k of its parts owns.

    In a chain that is one filter of one convolution. Where maps are added, it is one filter of each
    convolution whose maps are added.
    """

    filters: int
    parts: tuple[Part, ...]
    passed: tuple[str, ...] = ()
    """Operations that its maps pass and that may use several channels at once."""

    def channels(self) -> int:
        """How many channels its first layer has."""
        return len(self.parts[0].channels)

    def side(self, side: str) -> list[Part]:
        return [part for part in self.parts if part.side == side]


@dataclass(frozen=True)
class Network:
    """A network, and its groups by the name of their first convolution, in the order of use.

    It speaks of layers by name, so it holds for copies too (``of``).
    """

    model: nn.Module
    groups: dict[str, Group]
    left_out: dict[str, str]
    """Why filters can't go, by name of their first convolution."""
    softmax: str | None = None
    """The softmax that puts out the network's outputs, if that is known."""
    images: Inputs | None = None
    """A few images, if the network was read from them; what is derived from it is tried on them."""

    def of(self, model: nn.Module) -> "Network":
        """The same description for ``model``, a copy."""
        return replace(self, model=model)

    def filters(self) -> dict[str, int]:
        """How many filters each group has."""
        return {name: group.filters for name, group in self.groups.items()}

    def without(self, reasons: dict[str, str]) -> "Network":
        """The same network without some of its groups, and why their filters can't go."""
        groups = {name: group for name, group in self.groups.items() if name not in reasons}
        named = {
            part.name: why
            for name, why in reasons.items()
            for part in self.groups[name].side("out")
            if isinstance(self.layer(part.name), CONV | nn.Linear)
        }
        return replace(self, groups=groups, left_out=self.left_out | named)

    def only(self, wanted: Callable[[str], bool]) -> "Network":
        """The same network with fewer of its groups."""
        return replace(self, groups={n: group for n, group in self.groups.items() if wanted(n)})

    def layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def names_of(self, keep: Collection[str] | str) -> set[str]:
        """Return the groups of which ``keep`` names a layer, or a module that a layer is in.

        Raises ``ValueError`` for a name that has no filters.
        """
        found = set()
        for kept in names_of(keep):
            names = {
                name
                for name, group in self.groups.items()
                if any(is_inside(part.name, kept) for part in group.side("out"))
            }
            layers = (n for n, m in self.model.named_modules() if isinstance(m, CONV | nn.Linear))
            if not names and not any(is_inside(name, kept) for name in layers):
                raise ValueError(f"keep names {kept}, which has no filters that could go.")
            found |= names
        return found

    def checked(self, filters: Mapping[str, Iterable[int]]) -> Filters:
        """``filters`` as sorted lists of integers, or a ``ValueError`` that says what is wrong.

        Filters that can't go exactly are a ``TypeError`` that says why.
        """
        if not isinstance(filters, Mapping):
            raise TypeError(
                "The filters must be {layer: [indices]}, but they are a "
                f"{type(filters).__name__}."
            )
        checked, widths = {}, self.filters()
        for layer, indices in filters.items():
            if layer in self.left_out:
                raise TypeError(f"{layer} can't lose filters: {self.left_out[layer]}.")
            if layer not in widths:
                for name, group in self.groups.items():
                    if any(part.name == layer for part in group.side("out")):
                        raise ValueError(f"{layer} goes with {name}: name filters of {name}.")
                raise ValueError(
                    f"{shown(layer)} is not a layer whose filters can go: those are "
                    f"{', '.join(map(repr, widths)) or 'none'}."
                )
            try:
                # One index more than there are filters shows a repeated one, and ends an endless
                # list.
                indices = list(islice(indices, widths[layer] + 1))
                checked[layer] = sorted(index(k) for k in indices)
            except TypeError:
                said = shown(indices)
                mask = "True" in said or "False" in said
                raise ValueError(
                    f"The filters of {layer} must be a list of integers, but they are {said}"
                    + (": of a mask, take nonzero().flatten()." if mask else ".")
                ) from None
            last = widths[layer] - 1
            wrong = [k for k in checked[layer] if not 0 <= k <= last]
            if wrong:
                raise ValueError(f"{layer} has filters 0 to {last}, but {shown(wrong)} were named.")
            if len(set(checked[layer])) < len(checked[layer]):
                raise ValueError(f"{layer} has a filter named twice in {shown(checked[layer])}.")
        return checked


def is_inside(layer: str, module: str) -> bool:
    """Whether the name ``layer`` is that of ``module``, or of a layer in it."""
    return f"{layer}.".startswith(f"{module}.")


def names_of(keep: Collection[str] | str) -> list[str]:
    """Return ``keep`` as a list, also if it is one name; ``TypeError`` if it isn't names."""
    names = [keep] if isinstance(keep, str) else keep
    if isinstance(names, Collection) and not isinstance(names, Tensor):
        if all(isinstance(name, str) for name in names):
            return list(names)
    raise TypeError(f"keep must be a list of names of layers, but it is {shown(keep)}.")


def by_filter(values: Tensor, part: Part, filters: int) -> Tensor:
    """The channels of ``part``, axis 1 of ``values`` (N, C, ...), as (N, filters, values)."""
    order = part.owners.argsort(stable=True)
    channels = part.channels[order]
    if len(channels) < values.shape[1] or (channels.diff() != 1).any():
        values = values.index_select(1, channels.to(values.device))
    return values.reshape(len(values), filters, math.prod(values.shape[1:]) // filters)
