"""The truth that the criteria estimate: what removing each filter does to the loss."""

from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from cnn_pruning.chain import Chain, read_chain
from cnn_pruning.data import batches
from cnn_pruning.passes import Cost, device_of, evaluation, outputs_of, pieces, summed_loss
from cnn_pruning.ranks import summed
from cnn_pruning.scores import Scores


@torch.no_grad()
def oracle(
    model: nn.Module | Chain, data: Dataset, batch_size: int = 100, cost: Cost | None = None
) -> Scores:
    """Return the change of the mean cross-entropy (nats) when each filter is masked alone.

    By name of convolution, float64 (K,) on the CPU, positive where the loss rises: the paper's
    *oracle-loss*. Exact, up to rounding, for any chain network. With ``cost``, it is the change of
    the mean of ``cost(outputs, labels)``, (N,).

    Only what comes behind a filter is computed again. Where that is a linear layer, the filter's
    part of its output is subtracted, which costs no more for all filters than the layer does once.

    Raises ``TypeError`` if the network isn't a chain, ``ValueError`` for an empty dataset.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    chain = read_chain(model)
    device = device_of(chain.model)
    change = {
        layer: torch.zeros(filters, dtype=torch.float64)
        for layer, filters in chain.filters().items()
    }
    run = fx.Interpreter(chain.model, garbage_collect_values=False, graph=chain.graph)
    nodes = list(chain.graph.nodes)
    places = {node.target: i for i, node in enumerate(nodes) if node.op == "call_module"}
    constants = {node: node.meta["constant"] for node in nodes if "constant" in node.meta}
    with evaluation(chain.model):
        for images, labels in pieces(batches(data, batch_size), device):
            start = partial(run.run, initial_env=dict(constants))
            outputs = outputs_of(chain.model, images, start)
            base = summed_loss(outputs, labels, cost).cpu().double()
            values = run.env
            for layer, link in chain.links.items():
                before = {node: values[node] for node in nodes[: places[link.consumer]]}
                consumer = nodes[places[link.consumer]]
                x = values[consumer.all_input_nodes[0]]
                for k, y in enumerate(_without_each(chain, link.consumer, x, len(change[layer]))):
                    masked = run.run(initial_env=constants | before | {consumer: y})
                    change[layer][k] += summed_loss(masked, labels, cost).cpu().double() - base
    change = summed(data, chain.model, change)
    return {layer: total / len(data) for layer, total in change.items()}


def oracle_abs(
    model: nn.Module | Chain, data: Dataset, batch_size: int = 100, cost: Cost | None = None
) -> Scores:
    """The absolute value of ``oracle``: the paper's *oracle-abs*, which the criteria estimate.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    return {layer: v.abs() for layer, v in oracle(model, data, batch_size, cost).items()}


def _without_each(chain: Chain, name: str, x: Tensor, filters: int):
    """What the consumer puts out for ``x``, (N, K, H, W) or (N, K M), with each filter masked."""
    consumer = chain.model.get_submodule(name)
    if isinstance(consumer, nn.Linear):
        whole = consumer(x)
        parts = x.unflatten(1, (filters, -1))
        blocks = consumer.weight.unflatten(1, (filters, -1))
        for k in range(filters):
            yield whole - parts[:, k] @ blocks[:, k].T
    else:
        for k in range(filters):
            masked = x.clone()
            masked[:, k] = 0
            yield consumer(masked)
