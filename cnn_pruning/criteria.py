"""The criteria: rules that give every filter a score, high for a filter that matters."""

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(feature map, gradient), both (N, K, M), to the score of each filter on each example, (N, K)."""


def taylor(feature_map: Tensor, gradient: Tensor) -> Tensor:
    """|(1/M) sum_m (dC/dz_m) z_m|, for each example: the first-order estimate of the loss change.

    ``feature_map`` is z, the values that K filters put out on N examples at M positions, and
    ``gradient`` is dC/dz, where C is the loss of that one example; both floating point (N, K, M).
    Returns (N, K) in the same dtype. The score of a filter is the mean of this over the examples.

    Source: Molchanov et al. 2017, Eq. 8.
    """
    return (feature_map * gradient).mean(2).abs()


CRITERIA: dict[str, Criterion] = {"taylor": taylor}


def find(criterion: str | Criterion) -> Criterion:
    """Return the criterion of that name, or the function itself if one is given.

    Raises ``ValueError`` for an unknown name.
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(
            f"There is no criterion {criterion!r}: use {', '.join(map(repr, CRITERIA))}, or a "
            "function of (feature map, gradient)."
        )
    return CRITERIA[criterion]


def normalize(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide the scores of every layer, (K,), by their l2 norm, so that layers can be compared.

    A layer whose scores are all zero keeps its zeros.

    Source: Molchanov et al. 2017, section 2.2.
    """
    normalized = {}
    for layer, values in scores.items():
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)  # squares underflow in float32
        normalized[layer] = (values.double() / norm).to(values.dtype) if norm > 0 else values
    return normalized
