"""The criteria: rules that give every filter a score, high for a filter that matters.

Most are a function of what one filter puts out on one example, and of the loss's gradient there;
the score is the mean over the examples. The others look at the weights, or at all examples at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning.chain import links
from cnn_pruning.data import batches
from cnn_pruning.feature_maps import feature_maps
from cnn_pruning.oracle import oracle
from cnn_pruning.training import summed_loss, training_flags

Scores = dict[str, Tensor]
"""The score of each filter (K,), by name of convolution."""

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(feature map, gradient), both (N, K, M), to the score of each filter on each example, (N, K)."""

Criterion = Callable[[nn.Module, Dataset, int], Scores]
"""(model, data, batch size) to scores."""

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


def taylor_signed(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """(1/M) sum_m (dC/dz_m) z_m: as ``taylor``, but without the absolute value."""
    return (feature_map * gradient).mean(2)


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


def over_examples(per_example: PerExample, gradient: bool = True) -> Criterion:
    """Return the criterion that is the mean of ``per_example`` over all examples, in float64.

    Without ``gradient``, ``per_example`` is given None for it, and there is no backward pass.
    """

    def score(model: nn.Module, data: Dataset, batch_size: int) -> Scores:
        totals: Scores = {}
        for _, maps in feature_maps(model, data, batch_size, gradient):
            for layer, (z, slope) in maps.items():
                values = per_example(z, slope)
                shape = getattr(values, "shape", None)
                if not isinstance(values, Tensor) or shape != z.shape[:2]:
                    raise ValueError(
                        "The criterion must return a tensor (examples, filters), "
                        f"{tuple(z.shape[:2])} for {layer}, but it returned "
                        f"{type(values).__name__} {tuple(shape or ())}."
                    )
                total = values.cpu().sum(0, dtype=torch.float64)  # not every device has float64
                totals[layer] = totals[layer] + total if layer in totals else total
        return {layer: total / len(data) for layer, total in totals.items()}

    return score


def taylor_abs_last(model: nn.Module, data: Dataset, batch_size: int) -> Scores:
    """|mean over examples of (1/M) sum_m (dC/dz_m) z_m|: the absolute value comes last.

    Not Eq. 8, though common: near a minimum the changes of the examples cancel.
    """
    signed = over_examples(taylor_signed)(model, data, batch_size)
    return {layer: values.abs() for layer, values in signed.items()}


def activation_std(model: nn.Module, data: Dataset, batch_size: int) -> Scores:
    """The standard deviation of the feature map's values, over positions and examples together.

    The paper doesn't say over what; with a mean per example, as for the other criteria, maps of one
    position would all score zero.

    Source: Molchanov et al. 2017, section 2.2.
    """

    sums: dict[str, Tensor] = {}
    for _, maps in feature_maps(model, data, batch_size, gradient=False):
        for layer, (z, _) in maps.items():
            z = z.double()
            moments = torch.stack([z.mean(2).sum(0), z.square().mean(2).sum(0)]).cpu()
            sums[layer] = sums[layer] + moments if layer in sums else moments
    scores = {}
    for layer, moments in sums.items():
        mean, mean_square = moments / len(data)
        scores[layer] = (mean_square - mean.square()).clamp(min=0).sqrt()
    return scores


def mutual_information(model: nn.Module, data: Dataset, batch_size: int) -> Scores:
    """The information (nats) that a filter's quantized activation gives about the label.

    I(a, y) = sum p(a, y) log(p(a, y) / p(a) p(y)). The paper leaves open what is quantized, and
    how: here it is the mean of the map, in ``BINS`` intervals that hold equally many examples.

    Source: Molchanov et al. 2017, section 2.2.
    """
    means: dict[str, list[Tensor]] = {}
    labels = []
    for batch, maps in feature_maps(model, data, batch_size, gradient=False):
        labels.append(batch.cpu())
        for layer, (z, _) in maps.items():
            means.setdefault(layer, []).append(activation_mean(z).cpu().double())
    quantiles = torch.arange(1, BINS, dtype=torch.float64) / BINS
    scores = {}
    for layer, parts in means.items():
        values = torch.cat(parts).T.contiguous()
        edges = values.quantile(quantiles, dim=1, interpolation="lower").T.contiguous()
        intervals = torch.searchsorted(edges, values)
        one_hot = nn.functional.one_hot(intervals, BINS).double()  # (K, N, BINS)
        classes = nn.functional.one_hot(torch.cat(labels)).double()  # (N, classes)
        joint = one_hot.mT @ classes / len(classes)
        apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
        scores[layer] = (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((1, 2))
    return scores


def weight(model: nn.Module, data: Dataset | None = None, batch_size: int = 0) -> Scores:
    """(1/|w|) sum w^2 over a filter's weights, without its bias. The data play no part.

    Source: Molchanov et al. 2017, section 2.2, "Minimum weight".
    """
    return {
        layer: link.conv.weight.detach().cpu().double().square().flatten(1).mean(1)
        for layer, link in links(model).items()
    }


def random(model: nn.Module, data: Dataset | None = None, batch_size: int = 0) -> Scores:
    """Uniform random numbers in [0, 1): the control. ``torch.manual_seed`` sets them."""
    return {
        layer: torch.rand(link.conv.out_channels, dtype=torch.float64)
        for layer, link in links(model).items()
    }


def obd(model: nn.Module, data: Dataset, batch_size: int, seed: int = 0) -> Scores:
    """(1/2) sum w^2 diag(H), over a filter's weights and bias: the second-order loss change.

    H is the Hessian of the mean loss. The diagonal is estimated, for each mini-batch once, as
    E[v * Hv] with random signs v drawn from ``seed``; so the batch size changes the result within
    the error of that estimate. It keeps its sign, and can be negative.

    The paper gives it for parameters; summing them over a filter, with the bias that leaves as
    well, is a choice.

    Source: LeCun, Denker, Solla 1990; Molchanov et al. 2017, section 2.2 and appendix.
    """
    chain = links(model)
    loader = batches(data, batch_size)
    if not chain:
        return {}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    owners = [
        (layer, p)
        for layer, link in chain.items()
        for p in (link.conv.weight, link.conv.bias)
        if p is not None
    ]
    parameters = [p for _, p in owners]
    frozen = [p for p in parameters if not p.requires_grad]
    totals = {
        layer: torch.zeros(link.conv.out_channels, dtype=torch.float64)
        for layer, link in chain.items()
    }
    try:
        for p in frozen:
            p.requires_grad_()
        with training_flags(model), torch.enable_grad():
            model.eval()
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                loss = summed_loss(model(images), labels)
                signs = [
                    (2.0 * torch.randint(2, p.shape, generator=generator) - 1).to(p)
                    for p in parameters
                ]
                slopes = torch.autograd.grad(loss, parameters, create_graph=True)
                curved = torch.autograd.grad(slopes, parameters, signs)
                for (layer, p), v, hv in zip(owners, signs, curved, strict=True):
                    saliency = (p.detach().square() * v * hv).flatten(1 if p.dim() > 1 else 0)
                    total = saliency.sum(1) if p.dim() > 1 else saliency
                    totals[layer] += total.cpu().double() / 2
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return {layer: total / len(data) for layer, total in totals.items()}


def oracle_abs(model: nn.Module, data: Dataset, batch_size: int) -> Scores:
    """The absolute change of the loss when the filter is masked: what the criteria estimate.

    Source: Molchanov et al. 2017, section 2.2, "Oracle pruning".
    """
    return {layer: change.abs() for layer, change in oracle(model, data, batch_size).items()}


PER_EXAMPLE: dict[str, PerExample] = {
    "taylor": taylor,
    "taylor_abs_first": taylor_abs_first,
    "taylor_squared": taylor_squared,
    "activation_mean": activation_mean,
    "apoz": apoz,
}

CRITERIA: dict[str, Criterion] = {
    "taylor": over_examples(taylor),
    "taylor_abs_first": over_examples(taylor_abs_first),
    "taylor_abs_last": taylor_abs_last,
    "taylor_squared": over_examples(taylor_squared),
    "weight": weight,
    "activation_mean": over_examples(activation_mean, gradient=False),
    "activation_std": activation_std,
    "apoz": over_examples(apoz, gradient=False),
    "mutual_information": mutual_information,
    "obd": obd,
    "random": random,
    "oracle": oracle_abs,
    "oracle_loss": oracle,
}


def find(criterion: str | PerExample) -> Criterion:
    """Return the criterion of that name, or the mean over all examples of the function given.

    Raises ``ValueError`` for an unknown name.
    """
    if callable(criterion):
        return over_examples(criterion)
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(
            f"There is no criterion {criterion!r}: use {', '.join(map(repr, CRITERIA))}, or a "
            "function of (feature map, gradient)."
        )
    return CRITERIA[criterion]


def normalize(scores: Scores) -> Scores:
    """Divide the scores of every layer, (K,), by their l2 norm, so that layers can be compared.

    A layer whose scores are all zero keeps its zeros.

    Source: Molchanov et al. 2017, section 2.2.
    """
    normalized = {}
    for layer, values in scores.items():
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)  # squares underflow in float32
        normalized[layer] = (values.double() / norm).to(values.dtype) if norm > 0 else values
    return normalized
