"""How a network is read, and the trial that what is read holds."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cnn_pruning.network import passes
from cnn_pruning.network.checks import check_module
from cnn_pruning.network.description import BATCH_NORM, Filters, Network, names_of
from cnn_pruning.network.graph import counts_on_them, floats_in, read_graph
from cnn_pruning.network.maps import on_feature_maps, zero
from cnn_pruning.network.passes import Inputs, UnreadableError
from cnn_pruning.network.removal import remove
from cnn_pruning.network.sequential import read_sequential

BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD)
LARGE = 1e3  # of an output
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


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
    except UnreadableError as unknown:
        if images is None:
            raise UnreadableError(
                f"{type(model).__name__} isn't a Sequential of layers that are known ({unknown}), "
                "so it has to be read from images: hand in data too, a dataset or a few images."
            ) from None
    with torch.inference_mode(False), torch.enable_grad(), passes.same_random_numbers():
        # Two, even of a single one: batch norm can't train on that
        images = tree_map(lambda x: torch.cat([x[:2], x[:1]])[:2], images)
        images = passes.on_device(images, passes.device_of(model))
        groups, left_out = read_graph(passes.copy_of(model), images)
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
        if wrong := _Trial(network).failing(filters):
            why = next(iter(wrong.values()))
            raise TypeError(f"{', '.join(wrong)} can't lose these filters: {why}.")
    return small


def only_exact(network: Network) -> Network:
    """Leave out the groups whose filters can't go exactly, as a trial of each shows."""
    if network.images is None or not network.groups:
        return network
    return network.without(_Trial(network).failing(_half_of_each(network.filters())))


def _half_of_each(filters: dict[str, int]) -> Filters:
    """About half of the filters of each group; for groups of one size, where that can be, not the
    same: a trial would not notice otherwise that two can only go together. Filter 0 goes and the
    last one stays, so that no half is the same from behind.
    """
    generator = torch.Generator().manual_seed(0)
    taken: Filters = {}
    for name, count in filters.items():
        others = [half for other, half in taken.items() if filters[other] == count]
        for _ in range(20 * (count > 1)):  # of few filters there are few halves
            inner = torch.randperm(count - 2, generator=generator) + 1
            more = count // 2 - 1 if count > 3 else len(others) % 2
            taken[name] = [0, *sorted(inner[:more].tolist())]
            if taken[name] not in others:
                break
    return taken


class _Trial:
    """Whether a network without filters is the masked one, tried in float64 on a copy.

    Weights that are all alike, or one a channel, are changed a little, so that nothing is hidden
    behind zeros.
    """

    def __init__(self, network: Network) -> None:
        model, images = passes.copy_of(network.model), network.images
        exact = tree_map(lambda x: x.double().cpu() if x.is_floating_point() else x.cpu(), images)
        with torch.inference_mode(False):
            model = _in_general_position(model.double().cpu())
        try:
            _outputs(model, exact, training=False)
        except ValueError:  # it counts on its own device
            model, exact = passes.copy_of(network.model), images
        _check_apart(model, exact)
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
        network = self.network.only(filters.__contains__)
        small = remove(network, filters).model
        for images, training, when in self.occasions:
            try:
                with on_feature_maps(network, zero(filters)):
                    masked = _outputs(network.model, images, training)
            except ValueError:
                if when:
                    continue  # the whole network can't take these
                raise
            try:
                removed = _outputs(small, images, training)
            except ValueError:
                return when + counts_on_them(passed)
            if len(masked) != len(removed) or not all(map(_close, removed, masked)):
                mixing = " or ".join(sorted(passed - {"view"})) or "something"
                return f"{when}{mixing} behind them uses several of them at once, or their number"
        return ""


def _check_apart(model: nn.Module, images: Inputs) -> None:
    """Raise ``TypeError`` if the outputs for the first image change with the second one."""
    others = tree_map(lambda x: torch.cat([x[:1], x[:1].roll(1, -1)]), images)
    found, beside = (_outputs(model, each, training=False) for each in (images, others))
    pairs = [pair for pair in zip(found, beside, strict=True) if pair[0].shape[:1] == (2,)]
    if not all(_close(one[:1], other[:1]) for one, other in pairs):
        raise TypeError(
            f"What {type(model).__name__} puts out for an image depends on the others in its "
            "mini-batch, so that no image has a loss of its own: take them apart in forward."
        )


@torch.no_grad()
def _outputs(model: nn.Module, images: Inputs, training: bool) -> list[Tensor]:
    model.train(training)
    with passes.same_random_numbers(), _Plain(next((p.dtype for p in model.parameters()), None)):
        found = floats_in(passes.outputs_of(model, images))
    if not found:
        raise TypeError(f"{type(model).__name__} puts out no tensor: nothing can be tried.")
    return found


class _Plain(TorchFunctionMode):
    """What dropout draws depends on how many channels there are: here it does nothing. And what a
    network of float64 makes of another precision, as ``x.float()`` does, is float64, too.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.exact = dtype == torch.float64

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "dropout" in getattr(function, "__name__", ""):
            return kwargs.get("input", *args[:1])
        output = function(*args, **kwargs)
        if self.exact and isinstance(output, Tensor) and output.is_floating_point():
            return output if output.dtype == torch.float64 else output.double()
        return output


def _larger(images: Tensor) -> Tensor:
    """Each side twice as long, but by no more than 32 pixels."""
    for axis in range(2, images.dim()):
        images = torch.cat([images, images.narrow(axis, 0, min(32, images.shape[axis]))], axis)
    return images


@torch.no_grad()
def _in_general_position(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.is_floating_point() and value.numel():
            channels = value.numel() == max(value.shape, default=1)  # one value each
            if channels or value.amin() == value.amax():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value += 0.1 * max(value.abs().mean(), 0.1) * noise
    return model


def _close(removed: Tensor, masked: Tensor) -> bool:
    # Rounding is far below this, and a channel too many or too few far above. What stands for "not
    # this one", -1e9 or -inf, says nothing about the size of the others.
    within = torch.finfo(masked.dtype).eps ** 0.5
    size = masked.abs()
    usual = size[size < LARGE].amax() if (size < LARGE).any() else 0
    return removed.shape == masked.shape and torch.allclose(
        removed, masked, rtol=within, atol=within * usual, equal_nan=True
    )


def check_keep(model: nn.Module, keep: Collection[str] | str) -> None:
    """Raise ``ValueError`` if ``keep`` names what isn't there: before a network is read."""
    check_module(model)
    there = {name for name, _ in model.named_modules()}
    for name in names_of(keep):
        if not name or name not in there:
            raise ValueError(f"keep names {name}, but the network has no such layer.")


def check_network(model: nn.Module) -> None:
    """Raise ``TypeError`` for what isn't a network of its own, with what to hand in instead."""
    check_module(model)
    if any(getattr(all_modules, f"_global{kind}") for kind in HOOKS):
        raise TypeError("There are hooks on all modules: remove them while you prune.")
    registered = set(model.modules())
    for name, layer in model.named_modules():
        if why := _obstacle(name, layer):
            raise TypeError(f"{name or 'The model'} {why}.")
        for attribute, value in vars(layer).items():
            inside = tree_leaves(value) if isinstance(value, list | tuple | dict) else []
            layers = {v for v in inside if isinstance(v, nn.Module)}
            if layers - registered and not attribute.startswith("_"):
                raise TypeError(
                    f"{name or 'model'}.{attribute} is a {type(value).__name__} of layers, which "
                    "PyTorch neither trains nor saves: make it an nn.ModuleList or an "
                    "nn.ModuleDict."
                )


def _obstacle(name: str, layer: nn.Module) -> str:
    """Why a network can't be read because of one of its modules, and what to do; "" if it can."""
    kind, inside = type(layer).__name__, f"{name or 'model'}."
    instead = "put in its place" if name else "hand in"
    if isinstance(layer, WRAPPERS):
        return f"is a {kind}: {instead} the network inside, {inside}module"
    if hasattr(layer, "_orig_mod"):
        return f"is what torch.compile returned: {instead} the network inside, {inside}_orig_mod"
    if isinstance(layer, torch.jit.ScriptModule):
        return f"is a {kind}, traced or scripted: {instead} the network it was traced from"
    if "forward" in vars(layer):
        return "has a forward of its own, set on the object: write it as a method of its class"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        return f"is a {kind} without weights yet: run one batch through the network first"
    # Hooks may change what a layer puts out, or look at it
    hooks = [h for kind in (HOOKS if name else BACKWARD) for h in getattr(layer, kind).values()]
    if not all(getattr(hook, "of_pruning", False) for hook in hooks):
        return "has hooks: remove them while you prune"
    if isinstance(layer, BATCH_NORM) and layer.running_mean is None:
        return (
            "is a batch norm without running statistics, so that one example's loss depends on the "
            "others: use track_running_stats=True"
        )
    return ""
