"""Prune a few filters at a time and train in between: the paper's own algorithm."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning import criteria
from cnn_pruning.criteria import MeanOverExamples, PerExample
from cnn_pruning.experiments import ranks, training
from cnn_pruning.experiments.data import batches, epoch, few_images
from cnn_pruning.experiments.progress import progress
from cnn_pruning.feature_maps import check_maps, scorable, warn_of, without_gradient
from cnn_pruning.measure import Budget, count_macs, count_parameters
from cnn_pruning.network.checks import check_function, integer
from cnn_pruning.network.description import Network
from cnn_pruning.network.maps import maps_seen, side_by_side
from cnn_pruning.network.passes import Cost, Inputs, copy_of
from cnn_pruning.network.reading import check_keep
from cnn_pruning.network.removal import remove
from cnn_pruning.scores import (
    ByLayer,
    Filters,
    Scores,
    in_filters,
    normalize,
    select_filters,
    spare_filters,
)

Rescore = Callable[[nn.Module, Scores], Scores]
"""(network as it is now, its scores) to the scores that are compared."""


@dataclass(frozen=True)
class Step:
    """The state after one removal."""

    model: nn.Module
    """The network as it is now; the next step trains a copy of it."""
    removed: Filters
    """What this step removed, by layer: indices of the *original* network."""
    kept: Filters
    """What remains, by layer: indices of the original network, in the order of the filters."""
    gone: Filters
    """What all steps so far removed: with it, ``remove_filters`` builds this network from a new
    original one."""
    filters: int
    parameters: int
    macs: int
    val_loss: float
    val_accuracy: float


def prune_iteratively(
    model: nn.Module,
    train: Dataset,
    val: Dataset,
    *,
    filters: int | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    milliseconds: float | None = None,
    per_step: int = 1,
    updates: int = 30,
    criterion: str | PerExample = "taylor",
    rescore: Rescore = lambda network, scores: normalize(scores),
    min_filters: ByLayer = 1,
    keep: Collection[str] = (),
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    cost: Cost | None = None,
    max_share: float = 1.0,
    multiple_of: ByLayer = 1,
    linear: bool = False,
) -> Iterator[Step]:
    """Alternate ``updates`` of training with removing the ``per_step`` lowest filters.

    Goes on until no more than ``filters``, ``parameters``, ``macs`` or ``milliseconds`` (for one
    image, measured here) remain, one of them; of parameters or MACs, a number below 1 is a share of
    what the network has. Yields a ``Step`` after every removal. ``model`` is never changed. If you
    stop early, the last step has a network that works; a last fine-tuning is left to you.

    After a removal, the statistics that batch norms hold are those of another network. They are
    taken anew from ``train``, by ``refresh_batch_norms``, before the step is evaluated.

    The updates are Adam's, as in ``fit``, on mini-batches of ``batch_size`` from ``train`` in an
    order that ``seed`` draws, at the constant rate ``lr``. After each removal the optimizer is a
    new one: trials showed no gain from keeping Adam's moments of the surviving weights.

    If ``criterion`` is a function of one example's feature map, the filters are scored in the
    passes of these updates, in training mode, as in the paper, at no extra cost. Otherwise, or
    without updates, they are scored on all of ``train`` after the updates. What is compared is
    ``rescore(network, scores)``: normalized scores, unless you want to subtract a cost, to compute
    other scores, or to leave out layers that may lose nothing at this step. ``min_filters``,
    ``max_share`` and ``multiple_of`` are as in ``TaylorPruner``; ``keep``, ``cost`` and ``linear``
    as in ``filter_scores``. With ``multiple_of``, a step takes the ``per_step`` lowest, or as many
    more as it takes until a layer can lose some, and what a layer keeps is a multiple.

    A network that isn't a Sequential is tried out once, before the first step: that each group can
    lose filters exactly. The steps rely on that.

    Several ranks work together if ``train`` comes from ``ranks.divide``, as in ``fit``, and all of
    them end with the same network, whatever ``criterion`` and ``rescore`` draw on each.

    Raises ``ValueError`` for a target that can't be reached or settings out of range, and
    ``TypeError`` if no filter can go, all at the first step, before anything is trained.

    Source: Molchanov et al. 2017, Figure 1 and section 2.
    """
    with ranks.together(train):  # raises, if it must, before anything is trained
        per_step = integer("per_step", per_step, 1)
        batch_size = integer("batch_size", batch_size, 1)
        updates = integer("updates", updates, 0)
        _, lr, seed = training.check_settings(1, lr, seed)
        check_function("rescore", rescore, "network", "scores")
        targets = dict(filters=filters, parameters=parameters, macs=macs, milliseconds=milliseconds)
        bounds = {"min_filters": min_filters, "max_share": max_share, "multiple_of": multiple_of}
        others = {"updates": updates, "per_step": per_step, "lr": lr, "linear": linear}
        ranks.agree(train, criterion=criterion, cost=cost, keep=keep, **targets, **bounds, **others)
        criteria.find(criterion)
        check_keep(model, keep)
        network, images = scorable(model, train, linear=linear), few_images(train, 1)
        kept_whole = network.names_of(keep)
        found = criteria.find(criterion, network, cost)
        on_the_way = found if updates and found not in criteria.WHOLE else None
        if on_the_way:
            check_maps(network)
        bounds["multiple_of"] = in_filters(multiple_of, network)
        spare = spare_filters(network.filters(), keep=kept_whole, **bounds)
        # What each layer keeps, in filters of the network that was handed in
        least = {name: count - spare[name] for name, count in network.filters().items()}
        budget = Budget(network, images, **targets)
        budget.check(remove(network, {name: list(range(count)) for name, count in spare.items()}))
        loss, _ = training.evaluate(model, val, cost=cost)
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss on the validation images is {loss} from the start: check these images "
                "and the network's weights."
            )
        if updates:
            training.check_trainable(model, train, batch_size)

    loader = batches(train, batch_size, torch.Generator().manual_seed(seed))
    stream = chain.from_iterable(epoch(loader, train, batch_size) for _ in count())
    widths = network.filters()
    kept = {name: list(range(count)) for name, count in widths.items()}
    with progress(sum(spare.values()), "pruning") as advance:
        while not ranks.of_all(train, budget.holds(network))[0]:  # milliseconds differ
            network = network.of(copy_of(network.model))
            scores = {}
            if updates:
                scores = _train(network, train, stream, updates, lr, seed, on_the_way, cost)
            if on_the_way is None:
                scored = network.only(lambda name: name not in kept_whole)
                scores = criteria.score(scored, train, criterion, 128, cost)
            with ranks.together(train):
                scores = rescore(network.model, scores)
                left = sum(network.filters().values()) - filters if filters else per_step
                most = min(per_step, left)
                chosen = _lowest(network, scores, most, least, bounds["multiple_of"])
            # Those of one rank, whatever rescore does on each
            chosen = ranks.gathered(train, network.model, chosen)[0]
            network = remove(network, chosen)
            training.refresh_batch_norms(network.model, train)
            removed = {name: [kept[name][k] for k in chosen.get(name, [])] for name in kept}
            kept = {name: [k for k in kept[name] if k not in removed[name]] for name in kept}
            for _ in chain(*chosen.values()):
                advance()
            val_loss, val_accuracy = training.evaluate(network.model, val, cost=cost)
            yield Step(
                network.model,
                removed,
                {name: list(indices) for name, indices in kept.items()},
                {name: sorted({*range(k)} - {*kept[name]}) for name, k in widths.items()},
                filters=sum(network.filters().values()),
                parameters=count_parameters(network.model),
                macs=count_macs(network.model, images),
                val_loss=val_loss,
                val_accuracy=val_accuracy,
            )


def _lowest(
    network: Network, scores: Scores, most: int, least: dict[str, int], multiples: dict[str, int]
) -> Filters:
    """The ``most`` lowest filters that are scored, where there are so many, or as many more as it
    takes until a layer can lose some.
    """
    widths, least, multiples = (
        {n: k for n, k in by.items() if isinstance(scores, dict) and n in scores}
        for by in (network.filters(), least, multiples)
    )
    most = min(most, sum(spare_filters(widths, least).values()))
    for n in count(most):
        chosen = network.checked(select_filters(scores, n, least, multiple_of=multiples))
        if any(chosen.values()):
            return chosen


def _train(
    network: Network,
    train: Dataset,
    stream: Iterator[tuple[Inputs, object, float]],
    updates: int,
    lr: float,
    seed: int,
    per_example: PerExample | None,
    cost: Cost | None,
) -> Scores:
    """Train in place on mini-batches of ``stream``; return scores from the same passes."""
    precision = training.mixed_precision(network.model)
    optimizer = torch.optim.Adam(network.model.parameters(), lr)
    mean = MeanOverExamples(per_example)
    total, unseen = 0.0, set()
    watched = network if per_example else network.only(lambda name: False)
    seed = ranks.seed_of_rank(seed, train)
    with training.in_training(network.model, seed), maps_seen(watched, gradient=True) as found:
        parallel = ranks.in_parallel(network.model, train)
        for _ in range(updates):
            loss, size, divisor = training.update(parallel, optimizer, stream, precision, cost)
            total += loss
            with ranks.all_or_none(parallel):
                if per_example and divisor < math.inf:
                    maps = side_by_side(network, found, size)
                    # The gradient of each example's own loss, not of the mean
                    mean.add({n: (_exact(z), _exact(s) * divisor) for n, (z, s) in maps.items()})
                    unseen |= without_gradient(found)
            found.clear()
    ranks.make_same(network.model, train)
    loss = ranks.summed(train, network.model, {"loss": float(total)})["loss"]
    if not math.isfinite(loss):  # on every rank alike
        raise FloatingPointError(f"The loss is {loss}: use an lr lower than {lr}.")
    warn_of(unseen)
    return mean.scores(network.model, train)


def _exact(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
