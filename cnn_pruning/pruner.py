"""Score the filters of a network, mask them, remove them: the method, step by step."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning import criteria, scores
from cnn_pruning.chain import Chain, Link, read_chain
from cnn_pruning.criteria import PerExample
from cnn_pruning.feature_maps import on_feature_maps
from cnn_pruning.passes import Cost, copy_of, index, shown
from cnn_pruning.scores import Filters, Scores, names_of, select_filters, spare_filters


def filter_scores(
    model: nn.Module,
    data: Dataset,
    criterion: str | PerExample = "taylor",
    batch_size: int = 128,
    cost: Cost | None = None,
) -> Scores:
    """Return the score of every filter by ``criterion``, on ``data``.

    The keys are the names of the convolutions, as ``model.named_modules()`` has them, in the order
    they are applied; the values are tensors (number of filters,) on the CPU, in the model's dtype
    or at least float32, not normalized. A convolution that puts out the network's own output is
    left out.

    ``criterion`` is a name in ``criteria.CRITERIA``, or a function of (feature map, gradient), both
    (N, filters, positions), that returns (N, filters): its mean over all examples is the score.
    ``data`` is any dataset of (image, label). A function, and ``"taylor"``, take one forward and
    one backward pass over it.

    The gradient is that of each example's own cross-entropy: the network returns logits
    (N, classes), and the labels are integers. With ``cost``, a function of (outputs, labels) that
    returns (N,), it is that of each example's own cost, and both may have any shape.

    The network runs in evaluation mode and is left as it was: no ``.grad``, hook or flag changes.
    Neither ``batch_size`` nor the order of the examples changes the result beyond rounding (of
    ``"obd"``, which estimates by random draws, see there).

    In a distributed program too, each process scores by itself on the ``data`` that it hands in,
    and nothing is exchanged. To score together, every rank calls this with ``ranks.divide(data)``
    if each has all of the data, or with ``ranks.pool(part)`` if each has a part of its own; all of
    them return the scores on all of the data.

    Raises ``TypeError`` if the network isn't a chain or ends in a softmax, ``ValueError`` for an
    unknown criterion, an empty dataset, or data that the network can't take.

    Source: Molchanov et al. 2017, section 2.2.
    """
    return criteria.score(read_chain(model), data, criterion, batch_size, cost)


@contextmanager
def mask_filters(model: nn.Module, filters: Mapping[str, Iterable[int]]) -> Iterator[nn.Module]:
    """Force the feature maps of ``filters`` to zero for as long as the block runs.

    ``filters`` maps names of convolutions to indices of their filters. Nothing is removed and no
    parameter changes. Raises as ``remove_filters`` does, except that a whole layer can be masked.

    Source: the gate g of Molchanov et al. 2017, Eq. 2.
    """
    chain = read_chain(model)
    masked = checked_filters(chain, filters)
    widths = chain.filters()

    def zero(layer: str, z: Tensor) -> Tensor | None:
        if not masked.get(layer):
            return None
        channels = z.reshape(len(z), widths[layer], -1)
        where = torch.tensor(masked[layer], device=z.device)
        return channels.index_fill(1, where, 0).reshape(z.shape)

    with on_feature_maps(chain, zero):
        yield model


def remove_filters(model: nn.Module, filters: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of ``model`` without ``filters``; ``model`` itself is untouched.

    ``filters`` maps names of convolutions to indices of their filters. With a filter go its weights
    and bias, its values in the batch norm, and the weights that the next layer has for it. In
    evaluation mode the copy's logits equal those of ``model`` with the same filters masked.

    Raises ``TypeError``, naming the layer, if the network isn't a chain of known layers, and
    ``ValueError`` for a layer that can't be pruned, an index out of range or given twice, or if a
    layer would lose all its filters.
    """
    return remove(read_chain(model), filters)


def remove(chain: Chain, filters: Mapping[str, Iterable[int]]) -> nn.Module:
    """``remove_filters`` for a network that has been read: ``chain.of`` its result is its chain."""
    removed = checked_filters(chain, filters)
    widths = chain.filters()
    for layer, indices in removed.items():
        if len(indices) == widths[layer]:
            raise ValueError(
                f"{layer} would lose all of its {len(indices)} filters: leave at least one."
            )
    with torch.inference_mode(False):  # else the copy couldn't be trained
        model = copy_of(chain.model)
        for layer, indices in removed.items():
            if indices:
                kept = [k for k in range(widths[layer]) if k not in indices]
                _keep(model, chain.links[layer], widths[layer], kept)
    return model


class TaylorPruner:
    """Scores the filters of ``model``, selects the lowest over all layers, and removes them.

    A wrapper around ``filter_scores``, ``select_filters`` and ``remove_filters``. ``criterion`` and
    ``cost`` are as in the first, ``min_filters`` and ``keep`` as in the second; with ``normalize``,
    the scores are normalized by layer before they are compared. The model is never changed.

    ``scores`` holds the last scores, as ``filter_scores`` returns them, or None.

    Raises ``ValueError`` for an unknown criterion, ``min_filters`` below 1 or an unknown layer in
    ``keep``, and ``TypeError`` if the network isn't a chain or ends in a softmax.

    Source: Molchanov et al. 2017, section 2; removal here is in one shot.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str | PerExample = "taylor",
        normalize: bool = True,
        min_filters: int = 1,
        keep: Collection[str] = (),
        cost: Cost | None = None,
    ) -> None:
        chain = read_chain(model)
        criteria.check(chain, criterion, cost)
        self.keep = names_of(keep)
        spare_filters(chain.filters(), min_filters, self.keep)
        self.model = model
        self.criterion = criterion
        self.normalize = normalize
        self.min_filters = min_filters
        self.cost = cost
        self.scores: Scores | None = None

    def score(self, data: Dataset, batch_size: int = 128) -> Scores:
        """Score every filter on ``data``; keep the scores and return them.

        Raises as ``filter_scores`` does; the scores from before are kept then.
        """
        self.scores = filter_scores(self.model, data, self.criterion, batch_size, self.cost)
        return self.scores

    def select(self, n: int) -> Filters:
        """Return the ``n`` filters with the lowest scores: for every layer, sorted indices.

        Raises ``RuntimeError`` before ``score``, and as ``select_filters`` does.
        """
        if self.scores is None:
            raise RuntimeError("There are no scores yet: call score(data) first.")
        compared = scores.normalize(self.scores) if self.normalize else self.scores
        return select_filters(compared, n, self.min_filters, self.keep)

    def prune(self, n: int) -> nn.Module:
        """Return a new network without the ``n`` filters that ``select(n)`` names.

        Raises as ``select`` does.
        """
        return remove_filters(self.model, self.select(n))


def checked_filters(chain: Chain, filters: Mapping[str, Iterable[int]]) -> Filters:
    """``filters`` as sorted lists of integers, or a ``ValueError`` that says what is wrong."""
    if not isinstance(filters, Mapping):
        raise TypeError(
            f"The filters must be {{layer: [indices]}}, but they are a {type(filters).__name__}."
        )
    checked = {}
    widths = chain.filters()
    for layer, indices in filters.items():
        if layer not in widths:
            prunable = ", ".join(map(repr, widths)) or "none"
            raise ValueError(
                f"{shown(layer)} is not a layer whose filters can go: those are {prunable}."
            )
        try:
            # One index more than there are filters shows a repeated one, and ends an endless list.
            indices = list(itertools.islice(indices, widths[layer] + 1))
            checked[layer] = sorted(index(k) for k in indices)
        except TypeError:
            raise ValueError(
                f"The filters of {layer} must be a list of integers, but they are {shown(indices)}."
            ) from None
        last = widths[layer] - 1
        wrong = [k for k in checked[layer] if not 0 <= k <= last]
        if wrong:
            raise ValueError(f"{layer} has filters 0 to {last}, but {shown(wrong)} were named.")
        if len(set(checked[layer])) < len(checked[layer]):
            raise ValueError(f"{layer} has a filter named twice in {shown(checked[layer])}.")
    return checked


def _keep(model: nn.Module, link: Link, filters: int, kept: list[int]) -> None:
    """In ``model``, keep only ``kept`` of one layer's ``filters``, and what depends on them."""
    conv, consumer = model.get_submodule(link.conv), model.get_submodule(link.consumer)
    norms = [model.get_submodule(name) for name in link.norms]
    for layer in (conv, *norms):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _keep_along(layer, name, 0, filters, kept)
    _keep_along(consumer, "weight", 1, filters, kept)
    conv.out_channels = len(kept)
    for norm in norms:
        norm.num_features = len(norm.running_mean)
    if isinstance(consumer, nn.Linear):
        consumer.in_features = consumer.weight.shape[1]
    else:
        consumer.in_channels = len(kept)


def _keep_along(layer: nn.Module, name: str, axis: int, filters: int, kept: list[int]) -> None:
    old = getattr(layer, name, None)
    if old is None:
        return
    # Behind a Flatten each filter has a block of values; otherwise, the block is one.
    parts = old.detach().unflatten(axis, (filters, -1))
    values = parts.index_select(axis, torch.tensor(kept, device=old.device))
    values = values.flatten(axis, axis + 1)
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(layer, name, values)
