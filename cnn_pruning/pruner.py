"""Score the filters of a network, mask them, remove them."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import index

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning import criteria
from cnn_pruning.chain import Link, links
from cnn_pruning.feature_maps import on_feature_maps

Scores = dict[str, Tensor]
Filters = Mapping[str, Iterable[int]]


def filter_scores(
    model: nn.Module,
    data: Dataset,
    criterion: str | criteria.PerExample = "taylor",
    batch_size: int = 128,
) -> Scores:
    """Return the score of every filter by ``criterion``, on ``data``.

    The keys are the names of the convolutions, as ``model.named_modules()`` has them, in the order
    they are applied; the values are tensors (number of filters,) on the CPU, in the model's dtype
    or at least float32, not normalized. A convolution that puts out the network's own output is
    left out.

    ``criterion`` is a name in ``criteria.CRITERIA``, or a function of (feature map, gradient), both
    (N, filters, positions), that returns (N, filters): its mean over all examples is the score. The
    gradient is that of each example's own cross-entropy. ``data`` is any dataset of
    (image, label). A function, and ``"taylor"``, take one forward and one backward pass over it.

    The network runs in evaluation mode and is left as it was: no ``.grad``, hook or flag changes.
    Neither ``batch_size`` nor the order of the examples changes the result beyond rounding (of
    ``"obd"``, which estimates by random draws, see there).

    Raises ``TypeError`` if the network isn't a chain, ``ValueError`` for an unknown criterion or
    an empty dataset.

    Source: Molchanov et al. 2017, section 2.2.
    """
    scores = criteria.find(criterion)(model, data, batch_size)
    dtypes = {layer: model.get_submodule(layer).weight.dtype for layer in scores}
    return {
        layer: values.to("cpu", torch.promote_types(dtypes[layer], torch.float32))
        for layer, values in scores.items()
    }


@contextmanager
def mask_filters(model: nn.Module, filters: Filters) -> Iterator[nn.Module]:
    """Force the feature maps of ``filters`` to zero for as long as the block runs.

    ``filters`` maps names of convolutions to indices of their filters. Nothing is removed and no
    parameter changes. Raises as ``remove_filters`` does, except that a whole layer can be masked.

    Source: the gate g of Molchanov et al. 2017, Eq. 2.
    """
    chain = links(model)
    masked = _checked(chain, filters)

    def zero(layer: str, z: Tensor) -> Tensor | None:
        if not masked.get(layer):
            return None
        channels = z.reshape(len(z), chain[layer].conv.out_channels, -1)
        where = torch.tensor(masked[layer], device=z.device)
        return channels.index_fill(1, where, 0).reshape(z.shape)

    with on_feature_maps(chain, zero):
        yield model


def remove_filters(model: nn.Module, filters: Filters) -> nn.Module:
    """Return a copy of ``model`` without ``filters``; ``model`` itself is untouched.

    ``filters`` maps names of convolutions to indices of their filters. With a filter go its weights
    and bias, its values in the batch norm, and the weights that the next layer has for it. In
    evaluation mode the copy's logits equal those of ``model`` with the same filters masked.

    Raises ``TypeError``, naming the layer, if the network isn't a chain of known layers, and
    ``ValueError`` for a layer that can't be pruned, an index out of range or given twice, or if a
    layer would lose all its filters.
    """
    chain = links(model)
    removed = _checked(chain, filters)
    for layer, indices in removed.items():
        if len(indices) == chain[layer].conv.out_channels:
            raise ValueError(
                f"{layer} would lose all of its {len(indices)} filters: leave at least one."
            )
    with torch.inference_mode(False):  # else the copy couldn't be trained
        model = copy.deepcopy(model)
        model.zero_grad()
        chain = links(model)
        for layer, indices in removed.items():
            if indices:
                _remove(chain[layer], indices)
    return model


class TaylorPruner:
    """Scores the filters of ``model``, selects the lowest over all layers, and removes them.

    ``criterion`` is as in ``filter_scores``. ``normalize`` divides the scores of each layer by
    their l2 norm before layers are compared. Every layer keeps at least ``min_filters``. The model
    is never changed.

    With ``cost``, a function of the model that returns what one filter of each layer costs
    (``cnn_pruning.savings`` has some), ``cost_weight`` times that is subtracted from the scores:
    the paper's regularization, with lambda = ``cost_weight``.

    ``scores`` holds the last scores, as ``filter_scores`` returns them, or None.

    Raises ``ValueError`` for an unknown criterion, ``min_filters`` below 1 or a ``cost_weight``
    that isn't finite or has no ``cost``, and ``TypeError`` if the network isn't a chain.

    Source: Molchanov et al. 2017, section 2; removal here is in one shot.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str | criteria.PerExample = "taylor",
        normalize: bool = True,
        min_filters: int = 1,
        cost: Callable[[nn.Module], Mapping[str, float]] | None = None,
        cost_weight: float = 0.0,
    ) -> None:
        if not math.isfinite(cost_weight) or (cost_weight and cost is None):
            raise ValueError(
                f"cost_weight={cost_weight!r} must be a finite number, and 0 without a cost."
            )
        if type(min_filters) is not int or min_filters < 1:
            raise ValueError(
                f"min_filters must be an integer of 1 or more, but it is {min_filters!r}."
            )
        links(model)
        self.model = model
        criteria.find(criterion)
        self.criterion = criterion
        self.normalize = normalize
        self.min_filters = min_filters
        self.cost = cost
        self.cost_weight = cost_weight
        self.scores: Scores | None = None

    def score(self, data: Dataset, batch_size: int = 128) -> Scores:
        """Score every filter on ``data``; keep the scores and return them.

        Raises as ``filter_scores`` does; the scores from before are kept then.
        """
        self.scores = filter_scores(self.model, data, self.criterion, batch_size)
        return self.scores

    def select(self, n: int) -> dict[str, list[int]]:
        """Return the ``n`` filters with the lowest scores: for every layer, sorted indices.

        Equal scores go by layer, then by index. Raises ``RuntimeError`` before ``score``, and
        ``ValueError`` if exactly ``n`` filters can't be taken or a score isn't finite.
        """
        if self.scores is None:
            raise RuntimeError("There are no scores yet: call score(data) first.")
        for layer, values in self.scores.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"{layer} has scores that are not finite ({values.tolist()}): check the "
                    "network's weights and the images."
                )
        spare = {
            layer: max(0, len(values) - self.min_filters) for layer, values in self.scores.items()
        }
        if type(n) is not int or not 0 <= n <= sum(spare.values()):
            room = ", ".join(f"{count} of {layer}" for layer, count in spare.items())
            raise ValueError(
                f"Can't remove {n!r} filters: with min_filters={self.min_filters} it must be an "
                f"integer from 0 to {sum(spare.values())} ({room})."
            )
        scores = criteria.normalize(self.scores) if self.normalize else self.scores
        costs = self.cost(self.model) if self.cost_weight else {}
        ranking = sorted(
            (
                (value - self.cost_weight * costs.get(layer, 0), layer, k)
                for layer in scores
                for k, value in enumerate(scores[layer].tolist())
            ),
            key=lambda entry: entry[0],  # a stable sort: ties stay in the order of the layers
        )
        selected: dict[str, list[int]] = {layer: [] for layer in scores}
        for _, layer, k in ranking:
            if n and len(selected[layer]) < spare[layer]:
                selected[layer].append(k)
                n -= 1
        return {layer: sorted(indices) for layer, indices in selected.items()}

    def prune(self, n: int) -> nn.Module:
        """Return a new network without the ``n`` filters that ``select(n)`` names.

        Raises as ``select`` does.
        """
        return remove_filters(self.model, self.select(n))


def _checked(chain: Mapping[str, Link], filters: Filters) -> dict[str, list[int]]:
    """``filters`` as sorted lists of integers, or a ``ValueError`` that says what is wrong."""
    checked = {}
    for layer, indices in filters.items():
        if layer not in chain:
            prunable = ", ".join(map(repr, chain)) or "none"
            raise ValueError(
                f"{layer!r} is not a layer whose filters can go: those are {prunable}."
            )
        try:
            indices = list(indices)
            if any(isinstance(k, bool) or getattr(k, "dtype", None) == torch.bool for k in indices):
                raise TypeError  # a mask, not indices
            checked[layer] = sorted(index(k) for k in indices)
        except TypeError:
            raise ValueError(
                f"The filters of {layer} must be a list of integers, but they are {indices!r}."
            ) from None
        last = chain[layer].conv.out_channels - 1
        wrong = [k for k in checked[layer] if not 0 <= k <= last]
        if wrong:
            raise ValueError(f"{layer} has filters 0 to {last}, but {wrong} were named.")
        if len(set(checked[layer])) < len(checked[layer]):
            raise ValueError(f"{layer} has a filter named twice in {checked[layer]}.")
    return checked


def _remove(link: Link, indices: list[int]) -> None:
    filters = link.conv.out_channels
    kept = [k for k in range(filters) if k not in indices]
    for layer in (link.conv, *link.followers):
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(layer, name, None)
            if values is not None and type(layer) is not nn.PReLU:
                _replace(layer, name, values[kept])
    weight = link.consumer.weight
    if isinstance(link.consumer, nn.Linear):  # one block of columns for each filter
        _replace(link.consumer, "weight", weight.unflatten(1, (filters, -1))[:, kept].flatten(1))
        link.consumer.in_features = link.consumer.weight.shape[1]
    else:
        _replace(link.consumer, "weight", weight[:, kept])
        link.consumer.in_channels = len(kept)
    link.conv.out_channels = len(kept)
    for layer in link.followers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(kept)


def _replace(layer: nn.Module, name: str, values: Tensor) -> None:
    values = values.detach().clone(memory_format=torch.preserve_format)
    old = getattr(layer, name)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(layer, name, values)
