"""Scores of filters: made comparable, and the lowest of them selected."""

from collections.abc import Collection

import torch
from torch import Tensor

from cnn_pruning.passes import integer, shown

Scores = dict[str, Tensor]
"""The score of each filter (K,), high for a filter that matters, by name of convolution."""

Filters = dict[str, list[int]]
"""Indices of filters, by name of convolution."""

_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


def normalize(scores: Scores) -> Scores:
    """Divide the scores of every layer, (K,), by their l2 norm, so that layers can be compared.

    A layer whose scores are all zero keeps its zeros.

    Raises ``TypeError`` for what aren't scores.

    Source: Molchanov et al. 2017, section 2.2.
    """
    normalized = {}
    for layer, values in _checked(scores).items():
        exact = values.double()  # squares underflow in float32
        largest = exact.abs().max()
        if largest > 0:
            exact = exact / largest
            exact = exact / torch.linalg.vector_norm(exact)
        dtype = values.dtype if values.is_floating_point() else torch.float32
        normalized[layer] = exact.to(dtype)
    return normalized


def select_filters(
    scores: Scores, n: int, min_filters: int = 1, keep: Collection[str] = ()
) -> Filters:
    """Return the ``n`` filters with the lowest scores over all layers: sorted indices by layer.

    ``scores`` are compared as they are: hand in ``normalize(scores)`` to compare layers on one
    scale, or subtract a cost. Every layer keeps at least ``min_filters``; the layers named in
    ``keep`` lose none. Equal scores go by layer, then by index.

    Raises ``ValueError`` if exactly ``n`` filters can't be taken, if a score isn't finite or if
    ``keep`` names another layer, and ``TypeError`` for what aren't scores.
    """
    scores = _checked(scores)
    for layer, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(
                f"{layer} has scores that are not finite ({shown(values.tolist())}): check the "
                "network's weights and the images."
            )
    spare = spare_filters({name: len(v) for name, v in scores.items()}, min_filters, keep)
    most = sum(spare.values())
    room = ", ".join(f"{count} of {layer}" for layer, count in spare.items())
    try:
        left = integer("n", n, 0)
    except ValueError:
        left = most + 1
    if left > most:
        raise ValueError(
            f"Can't remove {shown(n)} filters: with min_filters={min_filters} it must be an "
            f"integer from 0 to {most} ({room or 'there are no layers'})."
        )
    ranking = sorted(  # stable, so ties stay in the order of the layers
        ((value, layer, k) for layer in scores for k, value in enumerate(scores[layer].tolist())),
        key=lambda entry: entry[0],
    )
    selected: Filters = {layer: [] for layer in scores}
    for _, layer, k in ranking:
        if left and len(selected[layer]) < spare[layer]:
            selected[layer].append(k)
            left -= 1
    return {layer: sorted(indices) for layer, indices in selected.items()}


def spare_filters(
    widths: dict[str, int], min_filters: int = 1, keep: Collection[str] = ()
) -> dict[str, int]:
    """Return how many filters each layer can lose, of ``widths`` filters.

    Raises ``ValueError`` for ``min_filters`` below 1 or a name in ``keep`` that isn't a layer, and
    ``TypeError`` if ``keep`` doesn't hold names.
    """
    least = integer("min_filters", min_filters, 1)
    kept = names_of(keep)
    unknown = [name for name in kept if name not in widths]
    if unknown:
        raise ValueError(
            f"keep names {', '.join(unknown)}, but the layers are {', '.join(widths) or 'none'}."
        )
    return {layer: 0 if layer in kept else max(0, count - least) for layer, count in widths.items()}


def names_of(keep: Collection[str]) -> list[str]:
    """Return ``keep`` as a list, also if it is one name; ``TypeError`` if it isn't names."""
    names = [keep] if isinstance(keep, str) else keep
    if isinstance(names, Collection) and all(isinstance(name, str) for name in names):
        return list(names)
    raise TypeError(f"keep must be a list of names of layers, but it is {shown(keep)}.")


def _checked(scores: Scores) -> Scores:
    if not isinstance(scores, dict) or not all(isinstance(layer, str) for layer in scores):
        raise TypeError(
            "Scores must be {layer: tensor (filters,)}, as filter_scores returns them, but they "
            f"are {shown(scores)}."
        )
    for layer, values in scores.items():
        plain = isinstance(values, Tensor) and values.layout == torch.strided
        if not plain or values.dim() != 1 or values.is_meta or values.dtype not in _NUMBERS:
            kind = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else ""
            raise TypeError(
                f"The scores of {layer} must be a tensor of numbers (filters,), but they are a "
                f"{type(values).__name__} {kind}".rstrip()
                + "."
            )
        if not len(values):
            raise ValueError(f"{layer} has no scores: a layer has at least one filter.")
    return scores
