"""A network as it is scored, and its feature maps with the gradients of the loss, over data."""

import warnings
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning.experiments.data import batches, few_images
from cnn_pruning.network import passes
from cnn_pruning.network.description import IN_OUTPUTS, ONE_MAP, Network, is_inside, names_of
from cnn_pruning.network.maps import Maps, Seen, maps_seen, side_by_side
from cnn_pruning.network.passes import Cost, Inputs, size_of
from cnn_pruning.network.reading import check_keep, only_exact, read

# On a CPU, so many images go through at once that their feature maps have some 10 MiB: more leave
# the cache, and below 32 images what each operation costs by itself counts (measured).
BYTES, FEWEST = 10 * 2**20, 32
JOINED = 1_000  # so many are fetched together, if they lie in the memory anyway


def scorable(
    model: nn.Module | Network,
    data: Dataset | Inputs | None,
    keep: Collection[str] = (),
    linear: bool = False,
) -> Network:
    """Read ``model`` with the groups that are scored: those of convolutions, without ``keep``.

    With ``linear``, those of linear layers too. Filters that can't go exactly are left out, and a
    warning says which and why. A ``Network`` is returned as it is.

    Raises ``TypeError`` if no filter can go.
    """
    if isinstance(model, Network):
        return model
    check_keep(model, keep)
    network = read(model, few_images(data))
    kept, spared = network.names_of(keep), names_of(keep)

    def wanted(name: str) -> bool:
        stays = name in kept or any(is_inside(name, module) for module in spared)
        return not stays and (linear or not isinstance(network.layer(name), nn.Linear))

    units = any(isinstance(network.layer(name), nn.Linear) for name in network.groups)
    network = only_exact(network.only(wanted))
    reasons = {name: why for name, why in network.left_out.items() if wanted(name)}
    if not network.groups and not kept:
        raise TypeError(
            f"{type(model).__name__} has no filters that could go "
            f"({_listed(reasons) or 'no convolution'})"
            + (": linear=True takes hidden units of its linear layers." if units else ".")
        )
    reasons = {n: why for n, why in reasons.items() if why not in (IN_OUTPUTS, ONE_MAP)}
    if reasons:
        warnings.warn(f"Left out, because they can't go: {_listed(reasons)}.", stacklevel=3)
    return network


def _listed(reasons: dict[str, str]) -> str:
    """The names, at most three for each reason."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return "; ".join(
        ", ".join(found[:3]) + f" and {len(found) - 3} others" * (len(found) > 3) + f" ({why})"
        for why, found in names.items()
    )


def check_maps(network: Network) -> None:
    """Raise ``TypeError`` unless there is a map for each of the images that it was read from.

    In a mini-batch, that many time steps as examples would pass for examples.
    """
    if network.images is not None:
        network = network.of(passes.copy_of(network.model).eval())
        with torch.no_grad(), maps_seen(network) as found:
            passes.outputs_of(network.model, network.images)
        side_by_side(network, found, size_of(network.images))


def feature_maps(
    network: Network,
    data: Dataset,
    batch_size: int,
    gradient: bool = True,
    cost: Cost | None = None,
) -> Iterator[tuple[object, Maps]]:
    """Yield, for mini-batches or pieces of them, labels and (z, dC/dz) by name of group.

    z and dC/dz are (N, K, M), in the model's dtype and on its device: the maps of all that goes
    with a filter, side by side. C is each example's own cross-entropy, or its ``cost``. Without
    ``gradient``, dC/dz is None and only a forward pass is made.

    The network runs in evaluation mode, and is as it was whenever something is handed out.
    """
    check_maps(network)
    model, at_once = network.model, [FEWEST]
    unseen: set[str] = set()
    loader, device = batches(data, batch_size), passes.device_of(model)
    if device.type == "cpu" and type(data) is TensorDataset:  # small batches make small pieces
        loader = batches(data, max(int(batch_size), JOINED))
    for images, labels in passes.pieces(loader, device, lambda: at_once[0]):
        with torch.inference_mode(False), torch.set_grad_enabled(gradient):
            with passes.evaluation(model), maps_seen(network, gradient) as found:
                outputs = passes.outputs_of(model, images)
            if gradient and found:  # of the sum, so that each example has its own
                loss = passes.summed_loss(outputs, labels, cost)
                with passes.differentiable(loss):
                    loss.backward(inputs=[seen.z for seen in found])
                unseen |= without_gradient(found)
        size = sum(seen.z.nbytes for seen in found) or 1
        at_once[0] = max(FEWEST, size_of(images) * BYTES // size)
        yield labels, side_by_side(network, found, size_of(images))
    warn_of(unseen)


def without_gradient(found: list[Seen]) -> set[str]:
    """The groups with a map that the loss of these images doesn't depend on."""
    return {name for seen in found if seen.z.grad is None for name in seen.parts}


def warn_of(unseen: set[str]) -> None:
    """Warn that these groups score 0, in the name of who called the caller."""
    if unseen:  # in a part of the images, at least
        warnings.warn(
            f"The cost doesn't depend on {', '.join(sorted(unseen))}: these filters score 0.",
            stacklevel=3,
        )
