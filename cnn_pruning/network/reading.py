"""How a network is read, and the trial that what is read holds."""

import random
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from cnn_pruning.network.checks import check_module
from cnn_pruning.network.description import BATCH_NORM, Filters, Network, names_of
from cnn_pruning.network.graph import counts_on_them, floats_in, read_graph
from cnn_pruning.network.maps import on_feature_maps, zero
from cnn_pruning.network.passes import (
    Inputs,
    copy_of,
    device_of,
    on_device,
    outputs_of,
    size_of,
)
from cnn_pruning.network.removal import remove
from cnn_pruning.network.sequential import UnknownLayer, read_sequential

BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


class NeedsImages(TypeError):
    """A network that can only be read from images."""


def read(model: nn.Module | Network, images: Inputs | None = None) -> Network:
    """Read ``model`` from its modules, or else from a few ``images``; a ``Network`` as it is.

    Raises ``TypeError`` for what isn't a network of its own, if images are needed and there are
    none, and if nothing can be pruned.
    """
    if isinstance(model, Network):
        return model
    check_network(model)
    try:
        return read_sequential(model)
    except UnknownLayer as unknown:
        if images is None:
            raise NeedsImages(
                f"{type(model).__name__} isn't a Sequential of layers that are known ({unknown}), "
                "so it has to be read from images: hand in data too, a dataset or a few images."
            ) from None
    with torch.inference_mode(False), torch.enable_grad(), random_numbers_kept():
        images = tree_map(lambda x: x[:2], images)
        if size_of(images) < 2:  # batch norm can't train on a single image
            images = tree_map(lambda x: torch.cat([x, x]), images)
        images = on_device(images, device_of(model))
        groups, left_out = read_graph(copy_of(model), images)
    if not groups and not left_out:
        raise TypeError(f"{type(model).__name__} has no convolution whose filters could go.")
    return Network(model, groups, left_out, images=images)


def exact_removal(network: Network, filters: Filters) -> Network:
    """``remove``, where it is known to be exact: by the rules, or because it was tried.

    Raises ``TypeError`` if the result isn't the masked network.
    """
    small = remove(network, filters)
    filters = {name: gone for name, gone in filters.items() if gone}
    if network.images is not None and filters:
        trial = _Trial(network)
        if why := trial.fails(filters):
            alone = {name: gone for name, gone in filters.items() if trial.fails({name: gone})}
            raise TypeError(f"{', '.join(alone or filters)} can't lose these filters: {why}.")
    return small


def only_exact(network: Network) -> Network:
    """Leave out the groups whose filters can't go exactly, as a trial of each shows."""
    if network.images is None or not network.groups:
        return network
    trial = _Trial(network)
    some = {n: list(range(0, k - 1, 3)) for n, k in network.filters().items() if k > 1}
    return network.without(trial.failing(some))


class _Trial:
    """Whether a network without filters is the masked one, tried in float64 on a copy.

    Weights that are all alike are changed a little, so that nothing is hidden behind zeros.
    """

    def __init__(self, network: Network) -> None:
        model, images = copy_of(network.model), network.images
        exact = tree_map(lambda x: x.double().cpu() if x.is_floating_point() else x.cpu(), images)
        with torch.inference_mode(False):
            model = _in_general_position(model.double().cpu())
        try:
            with torch.no_grad(), random_numbers_kept():
                _outputs(model, exact, training=False)
        except ValueError:  # it counts on its own dtype or device
            model, exact = copy_of(network.model), images
        self.network = network.of(model)
        larger = tree_map(lambda x: _larger(x[:1]), exact)
        self.occasions = [
            (exact, False, ""),
            (larger, False, "on larger images, "),
            (exact, True, "in training, "),  # the last one, because it changes running statistics
        ]

    def failing(self, filters: Filters) -> dict[str, str]:
        """Why filters can't go, by group; halves are tried until the groups are found."""
        why = self.fails(filters)
        if not why:
            return {}
        names, found = list(filters), {}
        if len(names) > 1:
            for half in names[: len(names) // 2], names[len(names) // 2 :]:
                found |= self.failing({name: filters[name] for name in half})
        return found or dict.fromkeys(filters, why)

    def fails(self, filters: Filters) -> str:
        """Why the network without ``filters`` isn't the masked one; "" if it is."""
        passed = {op for name in filters for op in self.network.groups[name].passed}
        mixing = " or ".join(sorted(passed - {"view"})) or "something"
        mixed = f"{mixing} behind them uses several of them at once, or their number"
        small = remove(self.network, filters).model
        with torch.no_grad(), random_numbers_kept():
            for images, training, when in self.occasions:
                try:
                    with on_feature_maps(self.network, zero(filters)):
                        masked = _outputs(self.network.model, images, training)
                except ValueError:
                    if not when:
                        raise
                    continue  # nor can the whole network take these
                try:
                    removed = _outputs(small, images, training)
                except ValueError:
                    return when + counts_on_them(passed)
                if len(masked) != len(removed) or not all(map(_close, removed, masked)):
                    return when + mixed
        return ""


def _outputs(model: nn.Module, images: Inputs, training: bool) -> list[Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    model.train(training)
    with _NoDropout():
        found = floats_in(outputs_of(model, images))
    if not found:
        raise TypeError(f"{type(model).__name__} puts out no tensor: nothing can be tried.")
    return found


class _NoDropout(TorchFunctionMode):
    """What dropout draws depends on how many channels there are: here it does nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "dropout" in getattr(function, "__name__", ""):
            return args[0]
        return function(*args, **(kwargs or {}))


def _larger(images: Tensor) -> Tensor:
    """Each side twice as long, but by no more than 32 pixels."""
    for axis in range(2, images.dim()):
        more = images.narrow(axis, 0, min(32, images.shape[axis]))
        images = torch.cat([images, more], axis)
    return images


def _in_general_position(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.numel() and (value.dim() < 2 or value.amin() == value.amax()):
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value += 0.1 * (value.abs().mean() or 0.1) * noise
    return model


def _close(removed: Tensor, masked: Tensor) -> bool:
    # Rounding is far below this, and a channel too many or too few far above.
    tolerance = torch.finfo(masked.dtype).eps ** 0.5 * masked.nan_to_num().abs().max()
    return removed.shape == masked.shape and torch.allclose(
        removed, masked, rtol=0, atol=tolerance, equal_nan=True
    )


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore the caller's random numbers, PyTorch's and Python's, after the block; one thread at a
    time may be in it.
    """
    with _ONE_THREAD, torch.random.fork_rng():
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)


_ONE_THREAD = threading.RLock()


def check_keep(model: nn.Module, keep: Collection[str] | str) -> None:
    """Raise ``ValueError`` if ``keep`` names what isn't there: before a network is read."""
    check_module(model)
    there = {name for name, _ in model.named_modules()}
    for name in names_of(keep):
        if not name or name not in there:
            raise ValueError(f"keep names {name}, but the network has no such layer.")


def hooked(layer: nn.Module, kinds: tuple[str, ...] = HOOKS) -> bool:
    """Whether ``layer`` has hooks of others, which may change what it puts out, or look at it."""
    found = [hook for kind in kinds for hook in getattr(layer, kind).values()]
    return not all(getattr(hook, "of_pruning", False) for hook in found)


def check_network(model: nn.Module) -> None:
    """Raise ``TypeError`` for what isn't a network of its own, with what to hand in instead."""
    check_module(model)
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        raise TypeError("There are hooks on all modules: remove them while you prune.")
    registered = set(model.modules())
    for name, layer in model.named_modules():
        where, inside = (name, f"{name}.") if name else ("The model", "model.")
        kind = type(layer).__name__
        instead = "hand in" if not name else "put in its place"
        if isinstance(layer, WRAPPERS):
            raise TypeError(f"{where} is a {kind}: {instead} the network inside, {inside}module.")
        if hasattr(layer, "_orig_mod"):
            raise TypeError(
                f"{where} is what torch.compile returned: {instead} the network inside, "
                f"{inside}_orig_mod."
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a {kind}, traced or scripted: {instead} the network it was traced "
                "from."
            )
        if "forward" in vars(layer):
            raise TypeError(
                f"{where} has a forward of its own, set on the object: write it as a method of its "
                "class."
            )
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise TypeError(
                f"{where} is a {kind} without weights yet: run one batch through the network first."
            )
        if hooked(layer, HOOKS if name else BACKWARD):
            raise TypeError(f"{where} has hooks: remove them while you prune.")
        if isinstance(layer, BATCH_NORM) and layer.running_mean is None:
            raise TypeError(
                f"{where} is a batch norm without running statistics, so that one example's loss "
                "depends on the others: use track_running_stats=True."
            )
        for attribute, value in vars(layer).items():
            values = [*value.values()] if isinstance(value, dict) else value
            inside_list = isinstance(values, list | tuple) and not attribute.startswith("_")
            if inside_list and {v for v in values if isinstance(v, nn.Module)} - registered:
                raise TypeError(
                    f"{inside}{attribute} is a {type(value).__name__} of layers, which PyTorch "
                    "neither trains nor saves: make it an nn.ModuleList or an nn.ModuleDict."
                )
