"""The feature maps of a network's groups, seen and changed where a layer takes them.

A group's filter is gone when every layer that mixes channels takes zeros in place of its maps. So
the gate of Eq. 2 stands at each of these inputs, and nowhere else. Then no path meets the gate
twice, as it would with gates on z and ReLU(z), or on x and x + f(x): between two gates there is
always a layer that mixes channels. And no batch norm stands between a closed gate and the layer
that takes the map, so that zero stays zero.

A map is what was there before any pooling or flattening on the way to that layer.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from cnn_pruning.network.description import Filters, Network, Part, by_filter
from cnn_pruning.network.passes import UnreadableError

Maps = dict[str, tuple[Tensor, Tensor | None]]
"""(z, dC/dz) by name of group, both (N, K, M), for K filters with M values each."""

# They keep channels apart, and a map of zeros a map of zeros.
POOLING = {
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in "123"),
    *("interpolate", "pad", "flatten", "reshape", "view", "mean", "amax", "squeeze", "__getitem__"),
    *("clone", "contiguous", "dropout", "dropout1d", "dropout2d", "dropout3d"),
}


@dataclass
class Seen:
    """One map as layers take it, its channels along ``axis``, and which each group has in it."""

    z: Tensor
    axis: int
    parts: dict[str, Part]


Act = Callable[[Seen], Tensor | None]
"""What to do with a map; what it returns takes the map's place."""


def side_by_side(network: Network, found: list[Seen], examples: int) -> Maps:
    """All maps of each group, and their gradients, as (N, K, M), without their history.

    Raises ``TypeError`` unless each group was seen, with one map for each example.
    """
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in network.groups}
    for seen in found:
        for name, part in seen.parts.items():
            if len(seen.z) != examples:
                raise TypeError(
                    f"{name} puts out {len(seen.z)} feature maps for {examples} examples: in "
                    "forward, call it once for each image of an example, and let the examples be "
                    "the first axis (batch_first=True)."
                )
            slope = seen.z.grad
            if slope is None and seen.z.requires_grad:  # the loss doesn't depend on it
                slope = torch.zeros_like(seen.z)
            for row, values in zip(rows[name], (seen.z.detach(), slope), strict=True):
                if values is not None:
                    values = values.movedim(seen.axis, 1)
                    row.append(by_filter(values, part, network.groups[name].filters))
    lost = ", ".join(name for name, (maps, _) in rows.items() if not maps)
    if lost:
        raise TypeError(
            f"The feature maps of {lost} were not seen in a forward pass: remove hooks that "
            "replace what a layer puts out."
        )

    def joined(values: list[Tensor]) -> Tensor | None:
        return torch.cat(values, 2) if len(values) > 1 else next(iter(values), None)

    return {name: tuple(map(joined, row)) for name, row in rows.items()}


@contextmanager
def maps_seen(network: Network, gradient: bool = False) -> Iterator[list[Seen]]:
    """List the maps that are seen in the block, ready to have a ``gradient`` if it is asked for.

    Raises ``UnreadableError`` if the network's own ``forward`` switches gradients off there.
    """
    found: list[Seen] = []

    def note(seen: Seen) -> Tensor | None:
        if not gradient:
            # The network's own forward may switch gradients on
            found.append(replace(seen, z=seen.z.detach()))
            return None
        found.append(seen)
        if not torch.is_grad_enabled():
            raise UnreadableError(
                f"{', '.join(seen.parts)} runs under torch.no_grad() in the network's forward, or "
                "in gradient checkpointing with use_reentrant=True, so its filters have no "
                "gradient: freeze it by requires_grad_(False) instead, and switch checkpointing "
                "off."
            )
        if seen.z.requires_grad:
            seen.z.retain_grad()
            return None
        seen.z = seen.z.detach().requires_grad_()  # all that lies before it is frozen
        return seen.z.clone()  # a layer behind it may work in place, which a leaf can't take

    with on_feature_maps(network, note):
        yield found


def zero(filters: Filters) -> Act:
    """Return what forces the maps of ``filters`` to zero."""

    def act(seen: Seen) -> Tensor | None:
        gone = [
            part.channels[torch.isin(part.owners, torch.tensor(filters[name]))]
            for name, part in seen.parts.items()
            if filters.get(name)
        ]
        return seen.z.index_fill(seen.axis, torch.cat(gone).to(seen.z.device), 0) if gone else None

    return act


class _Pooling(TorchFunctionMode):
    """Notes of every tensor that pooling or flattening made what it was made of, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakTensorKeyDictionary()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in POOLING and args and isinstance(output, Tensor) and output is not args[0]:
            if _keeps_channels(name, args[0], output, args[1:], kwargs):
                z, steps = self.before(args[0])
                steps = *steps, (function, args[1:], kwargs)
                self.made[output] = z, version_of(z), version_of(output), steps
        return output

    def before(self, x: Tensor) -> tuple[Tensor, tuple]:
        """The map that ``x`` was made of, and how, unless one of them was changed since."""
        z, *versions, steps = self.made.get(x, (x, None, None, ()))
        return (z, steps) if versions == [version_of(z), version_of(x)] else (x, ())


@contextmanager
def on_feature_maps(network: Network, act: Act) -> Iterator[None]:
    """Call ``act`` with each map in every forward pass, once for all layers that take it.

    A network that was compiled runs uncompiled meanwhile: compiled, it has no place to look.
    """
    model = network.model
    takers: dict[nn.Module, dict[str, Part]] = {}
    for name, group in network.groups.items():
        for part in group.side("in"):
            takers.setdefault(model.get_submodule(part.name), {})[name] = part
    forks: dict[int, tuple[Tensor, int, Tensor]] = {}  # of one pass
    pooling, thread = _Pooling(), threading.get_ident()

    def look(taker: nn.Module, inputs: tuple) -> tuple | None:
        """``act`` sees the map that ``taker`` takes, as it was before any pooling."""
        if taker not in takers or threading.get_ident() != thread:
            return None  # of a copy that was made meanwhile, or of another thread's pass
        if not inputs:
            names = ", ".join(takers[taker])
            raise UnreadableError(f"The maps of {names} are handed on by keyword: use a position.")
        x, *rest = inputs
        tokens = isinstance(taker, nn.Linear) and x.dim() > 2
        z, steps = (x, ()) if tokens else pooling.before(x)
        axis = x.dim() - 1 if tokens else 1
        here, version, fork = forks.get(id(z), (None, 0, z))
        if here is not z or version != version_of(z):
            columns = x.shape[axis] // z.shape[axis]  # the layer takes so many values of each map
            parts = {}
            for name, part in takers[taker].items():
                first = part.channels % columns == 0
                channels, owners = part.channels[first] // columns, part.owners[first]
                parts[name] = replace(part, channels=channels, owners=owners)
            # A view, so that its gradient is the part that comes back through these layers alone.
            seen = Seen(z.view_as(z), axis, parts)
            fork = act(seen)
            fork = seen.z if fork is None else fork
            forks[id(z)] = z, version_of(z), fork
        for function, args, kwargs in steps:
            fork = function(fork, *args, **kwargs)
        return fork, *rest

    def clear(module: nn.Module, *_: object) -> None:
        if module is model and threading.get_ident() == thread:
            forks.clear()

    look.of_pruning = clear.of_pruning = True
    with ExitStack() as stack:
        if any(module._compiled_call_impl for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(model.register_forward_pre_hook(clear).remove)
        stack.callback(model.register_forward_hook(clear, always_call=True).remove)
        for taker in takers:
            stack.callback(taker.register_forward_pre_hook(look).remove)
        stack.enter_context(pooling)
        yield


def _keeps_channels(name: str, source: Tensor, output: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether channel c of ``source`` is channel c, or block c of a row, in ``output``."""
    if source.dim() < 2 or output.dim() < 2 or len(source) != len(output) or output.is_inference():
        return False
    if name.startswith("dropout"):
        return not kwargs.get("training", True)
    if name == "pad":
        return output.shape[:2] == source.shape[:2] and not kwargs.get("value")
    if name in ("mean", "amax", "squeeze"):
        places = kwargs.get("dim", args[0] if args else None)
        places = places if isinstance(places, tuple | list) else (places,)
        return all(type(place) is int and place % source.dim() > 1 for place in places)
    if name == "__getitem__":
        key = args[0] if isinstance(args[0], tuple) else (args[0],)
        all_channels = key[0] is ... or key[:2] == (slice(None), slice(None))
        return all_channels and output.shape[:2] == source.shape[:2]
    row = output.dim() == 2 and output.shape[1] == source[0].numel()
    return output.shape[1] == source.shape[1] or (row and name in ("flatten", "reshape", "view"))


def version_of(x: Tensor) -> int:
    """A number that grows when ``x`` is changed in place."""
    return 0 if x.is_inference() else x._version
