"""Score the filters of a network, mask them, remove them: the method, step by step."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import nn
from torch.utils.data import Dataset

from cnn_pruning import criteria
from cnn_pruning.criteria import PerExample
from cnn_pruning.experiments.data import few_images
from cnn_pruning.feature_maps import scorable
from cnn_pruning.measure import Budget
from cnn_pruning.network.description import Network, names_of
from cnn_pruning.network.maps import on_feature_maps, zero
from cnn_pruning.network.passes import Cost, Inputs, UnreadableError
from cnn_pruning.network.reading import check_keep, exact_removal, read
from cnn_pruning.network.removal import remove
from cnn_pruning.scores import ByLayer, Filters, Scores, in_filters, select_filters, spare_filters
from cnn_pruning.scores import normalize as normalized


def filter_scores(
    model: nn.Module,
    data: Dataset,
    criterion: str | PerExample = "taylor",
    batch_size: int = 128,
    cost: Cost | None = None,
    keep: Collection[str] = (),
    linear: bool = False,
) -> Scores:
    """Return the score of every filter by ``criterion``, on ``data``.

    The keys are the names of the convolutions, as ``model.named_modules()`` has them, in the order
    they are applied; the values are tensors (number of filters,) on the CPU, in the model's dtype
    or at least float32, not normalized. Where filters can only go together (maps that are added, a
    depthwise convolution and the one before it, the groups of a grouped convolution or of a group
    norm), the key is the first convolution, and score k is that of all that goes with its filter k.
    With ``linear``, the hidden units of linear layers are scored, too.

    ``criterion`` is a name in ``criteria.CRITERIA`` ("taylor", "weight", "oracle_abs", "random" and
    others), or a function of (feature map, gradient), both (N, filters, values), that returns
    (N, filters): its mean over all examples is the score. The feature map has the values of all
    maps of a filter, side by side, as they were before pooling. ``data`` is any dataset of
    (image, label), or of ((image, vector), label) for a network of several inputs. A function, and
    ``"taylor"``, take one forward and one backward pass over it.

    The gradient is that of each example's own cross-entropy: the network returns logits
    (N, classes), and the labels are integers. With ``cost``, a function of (outputs, labels) that
    returns (N,), it is that of each example's own cost, which must not depend on the others, and
    both may be anything.

    The network runs in evaluation mode and is left as it was: no ``.grad``, hook or flag changes.
    Neither ``batch_size`` nor the order of the examples changes the result beyond rounding (of
    ``"obd"``, which estimates by random draws, see there).

    A network that isn't a Sequential is read from the first images, and it is tried whether the
    filters can go exactly. Those that can't are left out, with a warning that names them and says
    why; so are filters of the layers in ``keep``, and those that put out the network's own outputs.

    Several ranks score together, and all return the same, if their ``data`` come from
    ``ranks.divide`` or ``ranks.pool``.

    Raises ``TypeError`` if no filter can go, ``ValueError`` for an unknown criterion or layer, an
    empty dataset, data that the network can't take, or outputs that are probabilities (a
    ``TypeError`` where the softmax is known beforehand).

    Source: Molchanov et al. 2017, section 2.2, for the groups of Fang et al. 2023 (DepGraph).
    """
    criteria.find(criterion)
    return criteria.score(scorable(model, data, keep, linear), data, criterion, batch_size, cost)


@contextmanager
def mask_filters(
    model: nn.Module, filters: Mapping[str, Iterable[int]], data: Dataset | Inputs | None = None
) -> Iterator[nn.Module]:
    """Force the feature maps of ``filters`` to zero for as long as the block runs.

    ``filters`` maps names in ``filter_scores`` to indices. Nothing is removed and no parameter
    changes. Raises as ``remove_filters`` does, except that a whole layer can be masked.

    Source: the gate g of Molchanov et al. 2017, Eq. 2.
    """
    network = read(model, few_images(data))
    with on_feature_maps(network, zero(network.checked(filters))):
        yield model


def remove_filters(
    model: nn.Module, filters: Mapping[str, Iterable[int]], data: Dataset | Inputs | None = None
) -> nn.Module:
    """Return a copy of ``model`` without ``filters``; ``model`` itself is untouched.

    ``filters`` maps names in ``filter_scores`` to indices. With a filter go its weights and bias,
    its values in norms, the weights that the next layers have for it, and all that can only go
    together with it. In evaluation mode the copy's outputs equal those of ``model`` with the same
    filters masked.

    ``data``, a dataset or a batch of images, is needed where the network isn't a Sequential of
    known layers: it is read from two of them, and the equality is tried on them.

    Raises ``TypeError``, naming the layer, if images are needed and there are none or if filters
    can't go exactly, and ``ValueError`` for a layer that has no filters, an index out of range or
    given twice, or if a layer would lose all its filters.
    """
    network = read(model, few_images(data))
    return exact_removal(network, network.checked(filters)).model


@dataclass(eq=False, repr=False)
class TaylorPruner:
    """Scores the filters of ``model``, selects the lowest over all layers, and removes them.

    A wrapper around ``filter_scores``, ``select_filters`` and ``remove_filters``. ``criterion``,
    ``cost`` and ``linear`` are as in the first; ``min_filters``, ``keep``, ``max_share`` and
    ``multiple_of`` as in the second, but that ``keep`` may name any layer of a group, and
    ``multiple_of`` counts channels of a group's first layer, also where one score stands for
    several. With ``normalize``, the scores are normalized by layer before they are compared. The
    model is never changed.

    ``scores`` holds the last scores, as ``filter_scores`` returns them, or None.

    Raises ``ValueError`` for an unknown criterion, ``min_filters`` below 1 or an unknown layer in
    ``keep``, and ``TypeError`` if the network can't be pruned or ends in a softmax; if it isn't a
    Sequential, ``score`` raises them.

    Source: Molchanov et al. 2017, section 2; removal here is in one shot.
    """

    model: nn.Module
    criterion: str | PerExample = "taylor"
    normalize: bool = True
    min_filters: ByLayer = 1
    keep: Collection[str] = ()
    cost: Cost | None = None
    max_share: float = 1.0
    multiple_of: ByLayer = 1
    linear: bool = False
    scores: Scores | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        criteria.find(self.criterion)
        check_keep(self.model, self.keep)
        self.keep = names_of(self.keep)
        with suppress(UnreadableError):  # it is read from images, by ``score``
            self._spare(read(self.model))

    def score(self, data: Dataset, batch_size: int = 128) -> Scores:
        """Score every filter on ``data``; keep the scores and return them.

        Raises as ``filter_scores`` does; the scores from before are kept then.
        """
        network = scorable(self.model, data, linear=self.linear)
        self._spare(network)  # raises, before minutes of scoring
        self.scores = criteria.score(network, data, self.criterion, batch_size, self.cost)
        self.network, self.images = network, few_images(data, 1)
        return self.scores

    def _spare(self, network: Network) -> dict[str, int]:
        """How many filters each group can lose; raise if the settings aren't for ``network``."""
        criteria.find(self.criterion, network, self.cost)
        in_filters(self.multiple_of, network)
        kept = network.names_of(self.keep)
        return spare_filters(network.filters(), self.min_filters, kept, self.max_share)

    def select(self, n: int | None = None, **budget: float) -> Filters:
        """Return the ``n`` filters with the lowest scores: for every layer, sorted indices.

        Or as few as it takes for one of these to be at most what is given, in the pruned network:
        ``macs``, ``parameters``, ``filters`` or ``milliseconds`` (of one image, measured here). Of
        the first two, a number below 1, or 1.0, is a share of what the network has now.

        Raises ``RuntimeError`` before ``score``, ``ValueError`` for a budget that can't be reached,
        and as ``select_filters`` does.
        """
        if self.scores is None:
            raise RuntimeError("There are no scores yet: call score(data) first.")
        compared = normalized(self.scores) if self.normalize else self.scores
        limits = self.min_filters, self.network.names_of(self.keep), self.max_share
        multiples = in_filters(self.multiple_of, self.network)

        def lowest(count: int) -> Filters:
            return select_filters(compared, count, *limits, multiples)

        if (n is None) != bool(budget):
            raise ValueError(
                "Name the number of filters or a budget, not both: 7, for example, or macs=0.5."
            )
        if budget:
            wanted = Budget(self.network, self.images, **budget)
            n = sum(self._spare(self.network).values())
            wanted.check(remove(self.network, lowest(n)))
            n = bisect_left(
                range(n), True, key=lambda count: wanted.holds(remove(self.network, lowest(count)))
            )
        return lowest(n)

    def prune(self, n: int | None = None, **budget: float) -> nn.Module:
        """Return a new network without the filters that ``select`` names.

        Raises as ``select`` does.
        """
        filters = self.select(n, **budget)
        return exact_removal(self.network, filters).model
