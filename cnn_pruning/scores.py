"""Scores of filters: made comparable, and the lowest of them selected."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from cnn_pruning.network.checks import integer, kind_of, shown
from cnn_pruning.network.description import Filters, Network, names_of

Scores = dict[str, Tensor]
"""The score of each filter (K,), high for a filter that matters, by name of convolution."""

ByLayer = int | Mapping[str, int]
"""One number for all layers, or one for each layer named; the others have 1."""

_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


def normalize(scores: Scores) -> Scores:
    """Divide the scores of every layer, (K,), by their l2 norm, so that layers can be compared.

    A layer whose scores are all zero keeps its zeros.

    Raises ``TypeError`` for what aren't scores.

    Source: Molchanov et al. 2017, section 2.2.
    """
    normalized = {}
    for layer, values in _checked(scores).items():
        exact = values.double()
        exact = exact / (exact.abs().max() or 1)  # so that no square under- or overflows
        exact = exact / (exact.norm() or 1)
        dtype = values.dtype if values.is_floating_point() else torch.float32
        normalized[layer] = exact.to(dtype)
    return normalized


def select_filters(
    scores: Scores,
    n: int,
    min_filters: ByLayer = 1,
    keep: Collection[str] = (),
    max_share: float = 1.0,
    multiple_of: ByLayer = 1,
) -> Filters:
    """Return the ``n`` filters with the lowest scores over all layers: sorted indices by layer.

    ``scores`` are compared as they are: hand in ``normalize(scores)`` to compare layers on one
    scale, or subtract a cost. Every layer keeps at least ``min_filters``, and loses at most
    ``max_share`` of its filters; the layers named in ``keep`` lose none. Equal scores go by layer,
    then by index.

    With ``multiple_of``, what a layer keeps is rounded up to a multiple of that, or stays whole.
    Then *up to* ``n`` filters are returned.

    Raises ``ValueError`` if exactly ``n`` filters can't be taken, if a score isn't finite or if
    another layer is named, and ``TypeError`` for what aren't scores.
    """
    scores = _checked(scores)
    for layer, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(
                f"{layer} has scores that are not finite ({shown(values.tolist())}): check the "
                "network's weights and the images."
            )
    widths = {name: len(v) for name, v in scores.items()}
    spare = spare_filters(widths, min_filters, keep, max_share)
    multiples = by_layer("multiple_of", multiple_of, widths)
    most = sum(spare.values())
    try:
        left = integer("n", n, 0, most)
    except ValueError:
        limits = f"min_filters={min_filters}" + f" and max_share={max_share}" * (max_share < 1)
        room = ", ".join(f"{count} of {layer}" for layer, count in spare.items())
        raise ValueError(
            f"Can't remove {shown(n)} filters: with {limits} it must be an integer from 0 to "
            f"{most} ({room or 'there are no layers'})."
        ) from None
    ranking = sorted(  # stable, so ties stay in the order of the layers
        ((value, layer, k) for layer in scores for k, value in enumerate(scores[layer].tolist())),
        key=lambda entry: entry[0],
    )
    selected: Filters = {layer: [] for layer in scores}
    for _, layer, k in ranking:
        if left and len(selected[layer]) < spare[layer]:
            selected[layer].append(k)
            left -= 1
    return {
        layer: sorted(indices[: _whole(len(indices), widths[layer], multiples[layer])])
        for layer, indices in selected.items()
    }


def _whole(gone: int, width: int, multiple: int) -> int:
    """How many of ``width`` filters go, at most ``gone``, if a multiple is kept, or all."""
    return width - min(width, math.ceil((width - gone) / multiple) * multiple)


def spare_filters(
    widths: dict[str, int],
    min_filters: ByLayer = 1,
    keep: Collection[str] = (),
    max_share: float = 1.0,
    multiple_of: ByLayer = 1,
) -> dict[str, int]:
    """Return how many filters each layer can lose, of ``widths`` filters, down to a multiple.

    Raises ``ValueError`` for ``min_filters`` below 1, a ``max_share`` that isn't from 0 to 1 or a
    name that isn't a layer, and ``TypeError`` if ``keep`` doesn't hold names.
    """
    least = by_layer("min_filters", min_filters, widths)
    number = isinstance(max_share, int | float) and not isinstance(max_share, bool)
    if not number or not 0 <= max_share <= 1:
        raise ValueError(f"max_share must be from 0 to 1, but it is {shown(max_share)}.")
    kept = names_of(keep)
    _check_layers("keep", kept, widths)
    multiples, spare = by_layer("multiple_of", multiple_of, widths), {}
    for layer, count in widths.items():
        most = max(0, min(count - least[layer], math.floor(count * max_share + 1e-9)))
        spare[layer] = 0 if layer in kept else _whole(most, count, multiples[layer])
    return spare


def by_layer(name: str, value: ByLayer, layers: Collection[str]) -> dict[str, int]:
    """Return a number from 1 on for each layer; raise ``ValueError`` for anything else."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, integer(name, value, 1))
    _check_layers(name, value, layers)
    return {layer: integer(name, value.get(layer, 1), 1) for layer in layers}


def in_filters(multiple_of: ByLayer, network: Network) -> dict[str, int]:
    """Return by group, in filters, what ``multiple_of`` says in channels of its first layer."""
    multiples = by_layer("multiple_of", multiple_of, network.groups)
    each = {name: group.channels() // group.filters for name, group in network.groups.items()}
    return {name: k // math.gcd(k, each[name]) for name, k in multiples.items()}


def _check_layers(name: str, named: Collection[str], layers: Collection[str]) -> None:
    unknown = [str(layer) for layer in named if layer not in layers]
    if unknown:
        raise ValueError(
            f"{name} names {', '.join(unknown)}, but the layers are {', '.join(layers) or 'none'}."
        )


def _checked(scores: Scores) -> Scores:
    if not isinstance(scores, dict) or not all(isinstance(layer, str) for layer in scores):
        raise TypeError(
            "Scores must be {layer: tensor (filters,)}, as filter_scores returns them, but they "
            f"are {shown(scores)}."
        )
    for layer, values in scores.items():
        plain = isinstance(values, Tensor) and values.layout == torch.strided
        if not plain or values.dim() != 1 or values.is_meta or values.dtype not in _NUMBERS:
            raise TypeError(
                f"The scores of {layer} must be a tensor of numbers (filters,), but they are "
                f"{kind_of(values)}."
            )
        if not len(values):
            raise ValueError(f"{layer} has no scores: a layer has at least one filter.")
    return scores
