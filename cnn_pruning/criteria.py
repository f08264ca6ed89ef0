"""The criteria: rules that give every filter a score, high for a filter that matters.

Most are a function of what one filter puts out on one example, and of the loss's gradient there;
the score is the mean over the examples. The others look at the weights, or at all examples at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import one_hot
from torch.utils.data import Dataset

from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.ranks import agree, gathered, summed, together
from cnn_pruning.feature_maps import feature_maps
from cnn_pruning.network import passes
from cnn_pruning.network.checks import check_function, kind_of, shown
from cnn_pruning.network.description import CONV, Network, Part, by_filter
from cnn_pruning.network.maps import Maps
from cnn_pruning.network.passes import Cost, copy_of
from cnn_pruning.oracle import oracle, oracle_abs
from cnn_pruning.scores import Scores

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(feature map, gradient), both (N, K, M), to the score of each filter on each example, (N, K)."""

BINS = 10  # of the activation, for the mutual information


def taylor(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """|(1/M) sum_m (dC/dz_m) z_m|, for each example: the first-order estimate of the loss change.

    ``feature_map`` is z, the values that K filters put out on N examples at M positions, and
    ``gradient`` is dC/dz, where C is the loss of that one example; both floating point (N, K, M).
    Returns (N, K) in the same dtype. The score of a filter is the mean of this over the examples.

    Source: Molchanov et al. 2017, Eq. 8.
    """
    return (feature_map * gradient).mean(2).abs()


def taylor_abs_first(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """(1/M) sum_m |(dC/dz_m) z_m|: as ``taylor``, but with the absolute value of every position.

    Not Eq. 8, though common: within a map, changes of opposite sign don't cancel any more.
    """
    return (feature_map * gradient).abs().mean(2)


def taylor_squared(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """(sum_m (dC/dz_m) z_m)^2: the squared derivative with respect to a gate of 1 on the map.

    The source averages over mini-batches, each with its mean loss; here over examples, so that the
    size of the mini-batches doesn't matter. It has no normalization by layer.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), first order, on gates.
    """
    return (feature_map * gradient).sum(2).square()


def activation_mean(feature_map: Tensor, gradient: Tensor | None = None) -> Tensor:
    """(1/M) sum_m z_m: the mean of the feature map. Source: Molchanov et al. 2017, section 2.2."""
    return feature_map.mean(2)


def apoz(feature_map: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The share of positive values in the feature map.

    The paper describes it so; Hu et al. (2016, arXiv 1607.03250) define the average percentage of
    *zeros*, which ranks ReLU's filters the other way around.

    Source: Molchanov et al. 2017, section 2.2.
    """
    return (feature_map > 0).to(feature_map.dtype).mean(2)


class MeanOverExamples:
    """The mean of ``per_example`` over all examples that were added, in float64, by layer."""

    def __init__(self, per_example: PerExample) -> None:
        self.per_example = per_example
        self.totals: Scores = {}
        self.examples = 0

    def add(self, maps: Maps) -> None:
        """Add a mini-batch. Raises ``ValueError`` if the criterion doesn't return (N, K)."""
        for layer, (z, slope) in maps.items():
            values = passes.call("The criterion", self.per_example, z, slope)
            if not isinstance(values, Tensor) or values.shape != z.shape[:2]:
                raise ValueError(
                    "The criterion must return a tensor (examples, filters), "
                    f"{tuple(z.shape[:2])} for {layer}, but it returned {kind_of(values)}."
                )
            total = values.cpu().sum(0, dtype=torch.float64)  # not every device has float64
            self.totals[layer] = self.totals.get(layer, 0) + total
        self.examples += len(z)

    def scores(self, model: nn.Module, data: Dataset) -> Scores:
        """Return the mean, (K,), by layer; over all ranks if they share ``data``."""
        examples = summed(data, model, {"examples": self.examples})["examples"]
        totals = summed(data, model, self.totals)
        return {layer: total / examples for layer, total in totals.items()}


def over_examples(
    per_example: PerExample, network: Network, data: Dataset, batch_size: int, cost: Cost | None
) -> Scores:
    """Return the mean of ``per_example`` over all examples.

    ``FORWARD_ONLY`` functions are given None for the gradient, and there is no backward pass.
    """
    mean = MeanOverExamples(per_example)
    gradient = per_example not in FORWARD_ONLY
    for _, maps in feature_maps(network, data, batch_size, gradient, cost):
        mean.add(maps)
    return mean.scores(network.model, data)


def taylor_abs_last(network: Network, data: Dataset, batch_size: int, cost: Cost | None) -> Scores:
    """|mean over examples of (1/M) sum_m (dC/dz_m) z_m|: the absolute value comes last.

    Not Eq. 8, though common: near a minimum the changes of the examples cancel.
    """
    signed = over_examples(lambda z, g: (z * g).mean(2), network, data, batch_size, cost)
    return {layer: values.abs() for layer, values in signed.items()}


def activation_std(network: Network, data: Dataset, batch_size: int, *_: object) -> Scores:
    """The standard deviation of the feature map's values, over positions and examples together.

    The paper doesn't say over what; with a mean per example, as for the other criteria, maps of one
    position would all score zero.

    Source: Molchanov et al. 2017, section 2.2.
    """
    mean = MeanOverExamples(lambda z, _: z.double().mean(2))
    square = MeanOverExamples(lambda z, _: z.double().square().mean(2))
    for _, maps in feature_maps(network, data, batch_size, gradient=False):
        mean.add(maps)
        square.add(maps)
    means, squares = (each.scores(network.model, data) for each in (mean, square))
    return {n: (squares[n] - means[n].square()).clamp(min=0).sqrt() for n in means}


def mutual_information(network: Network, data: Dataset, batch_size: int, *_: object) -> Scores:
    """The information (nats) that a filter's quantized activation gives about the label.

    I(a, y) = sum p(a, y) log(p(a, y) / p(a) p(y)). The paper leaves open what is quantized, and
    how: here it is the mean of the map, in ``BINS`` intervals that hold equally many examples.

    Source: Molchanov et al. 2017, section 2.2.
    """
    found = []
    for labels, maps in feature_maps(network, data, batch_size, gradient=False):
        whole = isinstance(labels, Tensor) and labels.dtype == torch.int64
        if not whole or labels.dim() != 1 or labels.min() < 0:
            raise ValueError("Mutual information needs integer labels (N,), from 0 on.")
        means = {layer: activation_mean(z).cpu().double() for layer, (z, _) in maps.items()}
        found.append((labels.cpu(), means))
    found = [batch for of_rank in gathered(data, network.model, found) for batch in of_rank]
    classes = one_hot(torch.cat([labels for labels, _ in found])).double()  # (N, classes)
    quantiles = torch.arange(1, BINS, dtype=torch.float64) / BINS
    scores = {}
    for layer in network.groups:
        values = torch.cat([means[layer] for _, means in found]).T.contiguous()
        edges = values.quantile(quantiles, dim=1, interpolation="lower").T.contiguous()
        intervals = one_hot(torch.searchsorted(edges, values), BINS).double()  # (K, N, BINS)
        joint = intervals.mT @ classes / len(classes)
        apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
        scores[layer] = (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((1, 2))
    return scores


def weight(network: Network, *_: object) -> Scores:
    """(1/|w|) sum w^2 over all weights that make a filter's maps, without biases.

    The data play no part, but that some networks are read from them.

    Source: Molchanov et al. 2017, section 2.2, "Minimum weight".
    """
    scores = {}
    for name in network.groups:
        weights = [(part, p) for part, p in _parameters(network, name) if p.dim() > 1]
        rows = [_rows(network, name, part, values) for part, values in weights]
        scores[name] = torch.cat(rows, 1).detach().double().square().mean(1)
    return scores


def _parameters(network: Network, name: str) -> list[tuple[Part, nn.Parameter]]:
    """The weights and biases that make the maps of a group."""
    layers = [(part, network.layer(part.name)) for part in network.groups[name].side("out")]
    made = [(part, layer) for part, layer in layers if isinstance(layer, CONV | nn.Linear)]
    return [(part, p) for part, layer in made for p in (layer.weight, layer.bias) if p is not None]


def _rows(network: Network, name: str, part: Part, values: Tensor) -> Tensor:
    """``values`` of a parameter's shape, as (filters, values) of the group."""
    if values.dim() > 1 and getattr(network.layer(part.name), "transposed", False):
        # (in, out of one group, ...): the outputs of all groups first
        groups = network.layer(part.name).groups
        values = values.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return by_filter(values.reshape(1, len(values), -1), part, network.groups[name].filters)[0]


def random(network: Network, *_: object) -> Scores:
    """Uniform random numbers in [0, 1): the control. ``torch.manual_seed`` sets them."""
    return {n: torch.rand(k, dtype=torch.float64) for n, k in network.filters().items()}


@torch.inference_mode(False)
@torch.enable_grad()
def obd(
    network: Network, data: Dataset, batch_size: int, cost: Cost | None = None, seed: int = 0
) -> Scores:
    """(1/2) sum w^2 diag(H), over a filter's weights and bias: the second-order loss change.

    H is the Hessian of the mean loss. The diagonal is estimated, for each mini-batch once, as
    E[v * Hv] with random signs v drawn from ``seed``; so the batch size changes the result within
    the error of that estimate. It keeps its sign, and can be negative.

    The paper gives it for parameters; summing them over a filter, with the bias that leaves as
    well, is a choice.

    Source: LeCun, Denker, Solla 1990; Molchanov et al. 2017, section 2.2 and appendix.
    """
    device = passes.device_of(network.model)
    network = network.of(copy_of(network.model).eval())
    generator = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros(k, dtype=torch.float64) for name, k in network.filters().items()}
    places = [(name, *place) for name in totals for place in _parameters(network, name)]
    parameters = [parameter.requires_grad_() for *_, parameter in places]  # what is frozen, too
    for images, labels in batches(data, batch_size):
        images, labels = passes.on_device((images, labels), device)
        loss = passes.summed_loss(passes.outputs_of(network.model, images), labels, cost)
        signs = [torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1 for p in parameters]
        with passes.differentiable(loss):
            slopes = grad(loss, parameters, create_graph=True, materialize_grads=True)
            curved = grad(slopes, parameters, signs, materialize_grads=True)
        for (name, part, p), v, hv in zip(places, signs, curved, strict=True):
            saliency = _rows(network, name, part, p.detach().square() * v * hv).sum(1)
            totals[name] += saliency.cpu().double() / 2
    return {name: total / len(data) for name, total in summed(data, network.model, totals).items()}


FORWARD_ONLY = (activation_mean, apoz)
PER_EXAMPLE = (taylor, taylor_abs_first, taylor_squared, *FORWARD_ONLY)
NO_DATA = (weight, random)
FAMILY = (taylor, taylor_abs_first, taylor_abs_last, taylor_squared)
OTHERS = (weight, activation_mean, activation_std, apoz, mutual_information, obd)
CRITERIA = {each.__name__: each for each in (*FAMILY, *OTHERS, random, oracle, oracle_abs)}
# The others look at the weights, or at all examples at once
WHOLE = tuple(each for each in CRITERIA.values() if each not in PER_EXAMPLE)


def find(
    criterion: str | PerExample, network: Network | None = None, cost: Cost | None = None
) -> Callable:
    """Return the criterion of that name, or the function given, if it can be used for ``network``.

    Raises ``ValueError`` for an unknown name, and ``TypeError`` if it needs a loss and the network
    puts out probabilities.
    """
    found = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if not callable(found):
        raise ValueError(
            f"There is no criterion {shown(criterion)}: use {', '.join(map(repr, CRITERIA))}, or a "
            "function of (feature map, gradient)."
        )
    if found not in WHOLE:
        check_function("The criterion", found, "feature map", "gradient")
    if network and network.softmax and cost is None and found not in NO_DATA:
        raise TypeError(
            f"{network.softmax} is a softmax that puts out probabilities, but cross-entropy takes "
            "logits: leave it out of the network, or use nn.LogSoftmax."
        )
    return found


def score(
    network: Network, data: Dataset, criterion: str | PerExample, batch_size: int, cost: Cost | None
) -> Scores:
    """Return the scores by ``criterion``, on the CPU, in the weights' dtype, at least float32.

    Raises as ``filter_scores`` does.
    """
    found = find(criterion, network, cost)
    if not network.groups:
        return {}
    arguments = network, data, batch_size, cost
    with together(data):
        agree(data, criterion=criterion, cost=cost, filters=network.filters())
        scores = found(*arguments) if found in WHOLE else over_examples(found, *arguments)
    for name, values in scores.items():
        dtype = network.layer(name).weight.dtype
        scores[name] = values.to("cpu", torch.promote_types(dtype, torch.float32))
    return gathered(data, network.model, scores)[0]  # random numbers too are then of one rank
