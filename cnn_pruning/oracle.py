"""The truth that the criteria estimate: what removing each filter does to the loss."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.ranks import agree, summed, together
from cnn_pruning.feature_maps import scorable
from cnn_pruning.network import passes
from cnn_pruning.network.description import Network
from cnn_pruning.network.maps import on_feature_maps, version_of, zero
from cnn_pruning.network.passes import Cost, Inputs, outputs_of, summed_loss
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
    model, device = network.model, passes.device_of(network.model)
    change = {name: torch.zeros(k, dtype=torch.float64) for name, k in network.filters().items()}
    with together(data), passes.evaluation(model):
        agree(data, cost=cost, filters=network.filters())
        for images, labels in passes.pieces(batches(data, batch_size), device):
            outputs, last, x = _outputs_and_last(model, images)
            base = summed_loss(outputs, labels, cost).cpu().double()
            for name, group in network.groups.items():
                takers = group.side("in")
                alone = [network.layer(part.name) for part in takers] == [last]
                for k in range(group.filters):
                    if alone:
                        columns = takers[0].channels[takers[0].owners == k].to(device)
                        masked = outputs - x[:, columns] @ last.weight[:, columns].T
                    else:
                        with on_feature_maps(network.only({name}.__contains__), zero({name: [k]})):
                            masked = outputs_of(model, images)
                    change[name][k] += summed_loss(masked, labels, cost).cpu().double() - base
    return {name: total / len(data) for name, total in summed(data, model, change).items()}


def oracle_abs(
    model: nn.Module | Network, data: Dataset, batch_size: int = 100, cost: Cost | None = None
) -> Scores:
    """The absolute value of ``oracle``: the paper's *oracle-abs*, which the criteria estimate.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    return {layer: v.abs() for layer, v in oracle(model, data, batch_size, cost).items()}


def _outputs_and_last(
    model: nn.Module, images: Inputs
) -> tuple[object, nn.Linear | None, Tensor | None]:
    """The outputs, and the linear layer they are of, with its input, if both are still the same."""
    seen = []

    def keep(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if len(inputs) == 1:
            seen.append((layer, *inputs, output, version_of(inputs[0]), version_of(output)))

    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) is nn.Linear:
                stack.callback(layer.register_forward_hook(keep).remove)
        outputs = outputs_of(model, images)
    for layer, x, output, *versions in seen:
        if output is outputs and x.dim() == 2 and versions == [version_of(x), version_of(output)]:
            return outputs, layer, x
    return outputs, None, None
