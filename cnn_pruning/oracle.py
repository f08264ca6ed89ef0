"""The truth that the criteria estimate: what removing each filter does to the loss."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning.chain import layers, links
from cnn_pruning.data import batches
from cnn_pruning.training import summed_loss, training_flags


@torch.no_grad()
def oracle(model: nn.Module, data: Dataset, batch_size: int = 100) -> dict[str, Tensor]:
    """Return the change of the mean cross-entropy (nats) when each filter is masked alone.

    By name of convolution, float64 (K,) on the CPU, positive where the loss rises: the paper's
    *oracle-loss*; its absolute value is *oracle-abs*. Exact, up to rounding, for any chain network.

    Only the layers behind a filter are computed again. Where that is a linear layer, the filter's
    part of its output is subtracted, which costs no more for all filters than the layer does once.

    Raises ``TypeError`` if the network isn't a chain, ``ValueError`` for an empty dataset.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    chain = links(model)
    order = [layer for _, layer in layers(model)]
    starts = {name: order.index(link.consumer) for name, link in chain.items()}
    device = next(model.parameters()).device
    change = {
        name: torch.zeros(link.conv.out_channels, dtype=torch.float64)
        for name, link in chain.items()
    }
    with training_flags(model):
        model.eval()
        for images, labels in batches(data, batch_size):
            x, labels = images.to(device), labels.to(device)
            inputs = []  # of each layer, and last the logits
            for layer in order:
                inputs.append(x)
                x = layer(x.clone() if getattr(layer, "inplace", False) else x)
            base = summed_loss(x, labels).cpu().double()
            for name, start in starts.items():
                rest = order[start + 1 :]
                output = inputs[start + 1] if rest else x
                for k in range(len(change[name])):
                    y = _without(order[start], inputs[start], output, k, len(change[name]))
                    for layer in rest:
                        y = layer(y)
                    masked = summed_loss(y, labels).cpu().double()
                    change[name][k] += masked - base
    return {name: total / len(data) for name, total in change.items()}


def _without(consumer: nn.Module, x: Tensor, output: Tensor, k: int, filters: int) -> Tensor:
    """What ``consumer`` puts out for ``x`` with filter ``k`` masked; ``output`` is that without."""
    if isinstance(consumer, nn.Linear):
        block = consumer.weight.unflatten(1, (filters, -1))[:, k]
        return output - x.unflatten(1, (filters, -1))[:, k] @ block.T
    masked = x.clone()
    masked[:, k] = 0
    return consumer(masked)
