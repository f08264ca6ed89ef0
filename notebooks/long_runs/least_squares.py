"""Repair after a removal, in closed form: least squares on unlabeled images, layer by layer.

Notebook 10 derives what is here. All functions take the network before the removal, and return a
repaired copy of the one after it.
"""

import copy

from cnn_pruning import CNN

import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn
from torch.nn.functional import unfold

EACH = 500  # images at a time


@torch.no_grad()
def outputs(layers: nn.Module, images: Tensor) -> Tensor:
    """What ``layers`` put out, computed a few images at a time."""
    return torch.cat([layers(some) for some in images.split(EACH)])


def ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """The (weight, bias) that minimize |y - x weightᵀ - bias|² + λ |weight|².

    ``x`` is (examples, features), ``y`` (examples, outputs). λ is ``strength`` times the mean
    squared length of the rows of ``x``, once their mean is taken off. The smaller one of the two
    systems is solved, that of the features or that of the examples, in double precision.
    """
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, (y - y_mean).double()
    by_example = len(x) < x.shape[1]
    rows = x if by_example else x.T
    system = torch.empty(len(rows), len(rows), dtype=torch.double)  # 200 MB for 5,000, and no copy
    for part, some in zip(system.split(EACH), rows.split(EACH), strict=True):
        part.copy_(some @ rows.T)
    system.diagonal().add_(strength * system.trace() / len(x))
    right = y if by_example else x.T.double() @ y
    factor = cho_factor(system.T.numpy(), overwrite_a=True)
    solved = torch.from_numpy(cho_solve(factor, right.numpy())).to(x.dtype)
    weight = (x.T @ solved if by_example else solved).T
    return weight, y_mean.to(x.dtype) - weight @ x_mean


@torch.no_grad()
def with_linear_refitted(small: CNN, whole: CNN, images: Tensor, strength: float) -> CNN:
    """Change the linear layer so that the logits come near those of ``whole``."""
    missing = outputs(whole, images) - outputs(small, images)
    weight, bias = ridge(outputs(small.network[:-1], images), missing, strength)
    repaired = copy.deepcopy(small)
    repaired.network[-1].weight += weight
    repaired.network[-1].bias += bias
    return repaired


@torch.no_grad()
def with_convolution_refitted(small: CNN, whole: CNN, kept: list[int], images: Tensor) -> CNN:
    """Change the second convolution so that it computes what it did from fewer maps.

    ``kept`` are the filters of ``whole`` that ``small`` still has there.
    """
    conv = small.network[2]
    gram = right = 0.0
    for some in images.split(EACH):
        patches = unfold(small.network[:2](some), 3, padding=1)  # (examples, 9 C, positions)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)  # for the bias
        missing = (whole.network[:3](some)[:, kept] - small.network[:3](some)).flatten(2)
        x, y = (values.transpose(0, 1).flatten(1) for values in (patches, missing))
        gram, right = gram + (x @ x.T).double(), right + (x @ y.T).double()
    change = (torch.linalg.pinv(gram, hermitian=True) @ right).T.to(conv.weight.dtype)
    repaired = copy.deepcopy(small)
    repaired.network[2].weight += change[:, :-1].reshape(conv.weight.shape)
    repaired.network[2].bias += change[:, -1]
    return repaired


@torch.no_grad()
def with_means_absorbed(
    small: CNN, whole: CNN, removed: dict[str, list[int]], kept: list[int], images: Tensor
) -> CNN:
    """Add what the removed maps gave the next layer in the mean to its bias."""
    first, second = removed["network.0"], removed["network.2"]
    repaired = copy.deepcopy(small)
    means = outputs(whole.network[:2], images).mean((0, 2, 3))
    weight = whole.network[2].weight[kept][:, first].sum((2, 3))
    repaired.network[2].bias += weight @ means[first]
    maps = outputs(whole.network[:4], images).mean(0).flatten(1)  # by position
    blocks = whole.network[-1].weight.unflatten(1, (len(maps), -1))
    repaired.network[-1].bias += torch.einsum("kp,ckp->c", maps[second], blocks[:, second])
    return repaired
