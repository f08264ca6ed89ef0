"""The truth that the criteria estimate: what removing each filter does to the loss."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.ranks import summed
from cnn_pruning.feature_maps import scorable
from cnn_pruning.network.description import Network
from cnn_pruning.network.maps import on_feature_maps, zero
from cnn_pruning.network.passes import (
    Cost,
    device_of,
    evaluation,
    outputs_of,
    pieces,
    summed_loss,
)
from cnn_pruning.scores import Scores


@torch.no_grad()
def oracle(
    model: nn.Module | Network, data: Dataset, batch_size: int = 100, cost: Cost | None = None
) -> Scores:
    """Return the change of the mean cross-entropy (nats) when each filter is masked alone.

    By name of group, float64 (K,) on the CPU, positive where the loss rises: the paper's
    *oracle-loss*. Exact, up to rounding. With ``cost``, it is the change of the mean of
    ``cost(outputs, labels)``, (N,).

    It takes a forward pass for each filter. Where only a linear layer comes behind, and puts out
    the network's outputs, the filter's part of them is subtracted, which costs no more for all
    filters than the layer does once.

    Raises ``TypeError`` if no filter can go, ``ValueError`` for an empty dataset.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    network = scorable(model, data)
    model, device = network.model, device_of(network.model)
    change = {name: torch.zeros(k, dtype=torch.float64) for name, k in network.filters().items()}
    with evaluation(model):
        for images, labels in pieces(batches(data, batch_size), device):
            outputs, last = _outputs_and_last(network, images)
            base = summed_loss(outputs, labels, cost).cpu().double()
            for name, filters in network.filters().items():
                parts = last.get(name)
                for k in range(filters):
                    if parts is not None:
                        masked = outputs - parts(k)
                    else:
                        with on_feature_maps(network.only({name}.__contains__), zero({name: [k]})):
                            masked = outputs_of(model, images)
                    change[name][k] += summed_loss(masked, labels, cost).cpu().double() - base
    change = summed(data, model, change)
    return {name: total / len(data) for name, total in change.items()}


def oracle_abs(
    model: nn.Module | Network, data: Dataset, batch_size: int = 100, cost: Cost | None = None
) -> Scores:
    """The absolute value of ``oracle``: the paper's *oracle-abs*, which the criteria estimate.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    return {layer: v.abs() for layer, v in oracle(model, data, batch_size, cost).items()}


def _outputs_and_last(network: Network, images: Tensor):
    """The outputs, and for each group that only a last linear layer takes, its filters' parts."""
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    last = {}
    for name, group in network.groups.items():
        takers = group.side("in")
        layer = network.layer(takers[0].name)
        if len(takers) == 1 and isinstance(layer, nn.Linear):
            last[name] = takers[0]

            def keep(_: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
                taken[name] = inputs[0], output

            handles.append(layer.register_forward_hook(keep))
    try:
        outputs = outputs_of(network.model, images)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (x, output) in taken.items():
        if output is outputs and x.dim() == 2:
            weight, part = network.layer(last[name].name).weight, last[name]

            def of(k: int, x: Tensor = x, weight: Tensor = weight, part=part) -> Tensor:
                columns = part.channels[part.owners == k].to(x.device)
                return x[:, columns] @ weight[:, columns].T

            found[name] = of
    return outputs, found
