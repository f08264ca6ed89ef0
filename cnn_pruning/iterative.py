"""Prune a few filters at a time and train in between: the paper's own algorithm."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning import criteria
from cnn_pruning.chain import Chain, read_chain
from cnn_pruning.criteria import MeanOverExamples, PerExample
from cnn_pruning.data import batches, epoch, image_shape
from cnn_pruning.feature_maps import by_position, check_found, on_feature_maps, with_gradient
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.passes import check_function, copy_of, integer
from cnn_pruning.progress import progress
from cnn_pruning.pruner import remove
from cnn_pruning.ranks import gathered, in_parallel, make_same, seed_of_rank, summed
from cnn_pruning.scores import Filters, Scores, names_of, normalize, select_filters, spare_filters
from cnn_pruning.training import (
    check_settings,
    check_trainable,
    evaluate,
    in_training,
    mixed_precision,
    update,
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
    parameters: int | None = None,
    macs: int | None = None,
    per_step: int = 1,
    updates: int = 30,
    criterion: str | PerExample = "taylor",
    rescore: Rescore = lambda network, scores: normalize(scores),
    min_filters: int = 1,
    keep: Collection[str] = (),
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> Iterator[Step]:
    """Alternate ``updates`` of training with removing the ``per_step`` lowest filters.

    Goes on until no more than ``filters``, ``parameters`` or ``macs`` (one of them) remain, and
    yields a ``Step`` after every removal. ``model`` is never changed. If you stop early, the last
    step has a network that works; a last fine-tuning is left to you.

    The updates are Adam's, as in ``fit``, on mini-batches of ``batch_size`` from ``train`` in an
    order that ``seed`` draws, at the constant rate ``lr``. After each removal the optimizer is a
    new one: trials showed no gain from keeping Adam's moments of the surviving weights.

    If ``criterion`` is a function of one example's feature map, the filters are scored in the
    passes of these updates, in training mode, as in the paper, at no extra cost. Otherwise, or
    without updates, they are scored on all of ``train`` after the updates. What is compared is
    ``rescore(network, scores)``: normalized scores, unless you want to subtract a cost, to compute
    other scores, or to leave out layers that may lose nothing at this step. ``min_filters`` and
    ``keep`` are those of ``select_filters``.

    Several ranks work together if ``train`` comes from ``ranks.divide``, as in ``fit``, and all of
    them end with the same network, whatever ``criterion`` and ``rescore`` draw on each.

    Raises ``ValueError`` for a target that can't be reached or settings out of range, and
    ``TypeError`` if the network isn't a chain, all at the first step, before anything is trained.

    Source: Molchanov et al. 2017, Figure 1 and section 2.
    """
    name, target = _target(filters=filters, parameters=parameters, macs=macs)
    per_step = integer("per_step", per_step, 1)
    batch_size = integer("batch_size", batch_size, 1)
    updates = integer("updates", updates, 0)
    _, lr, seed = check_settings(1, lr, seed)
    chain = read_chain(model)
    found = criteria.check(chain, criterion)
    check_function("rescore", rescore, "network", "scores")
    on_the_way = found if updates and found not in criteria.WHOLE else None
    keep = names_of(keep)
    spare = spare_filters(chain.filters(), min_filters, keep)
    shape = image_shape(train)
    least = _sizes(chain.of(remove(chain, {k: range(n) for k, n in spare.items()})), shape)[name]
    if target < least:
        raise ValueError(
            f"The network can't get down to {target} {name}: with min_filters={min_filters} it "
            f"keeps at least {least}."
        )
    loss, _ = evaluate(model, val)  # raises, if it must, before anything is trained
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss on the validation images is {loss} from the start: check these images and "
            "the network's weights."
        )
    if updates:
        check_trainable(model, train, batch_size)

    stream = _endless(train, batch_size, seed)
    sizes = _sizes(chain, shape)
    kept = {layer: list(range(count)) for layer, count in chain.filters().items()}
    with progress(sum(spare.values()), "pruning") as advance:
        while sizes[name] > target:
            chain = chain.of(copy_of(chain.model))
            scores = {}
            if updates:
                scores = _train(chain, train, islice(stream, updates), lr, seed, on_the_way)
            if on_the_way is None:
                scores = criteria.score(chain, train, criterion, batch_size=128)
            scores = rescore(chain.model, scores)
            room = sum(spare_filters(chain.filters(), min_filters, keep).values())
            count = min(per_step, room, sizes[name] - target if name == "filters" else room)
            chosen = select_filters(scores, count, min_filters, [k for k in keep if k in scores])
            chosen = gathered(train, chain.model, chosen)[0]  # whatever rescore does on each rank
            chain = chain.of(remove(chain, chosen))
            sizes = _sizes(chain, shape)
            removed = {layer: [kept[layer][k] for k in chosen.get(layer, [])] for layer in kept}
            kept = {
                layer: [k for k in indices if k not in removed[layer]]
                for layer, indices in kept.items()
            }
            for _ in range(count):
                advance()
            val_loss, val_accuracy = evaluate(chain.model, val)
            yield Step(
                chain.model,
                removed,
                {layer: list(indices) for layer, indices in kept.items()},
                **sizes,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
            )


def _target(**targets: int | None) -> tuple[str, int]:
    named = {name: value for name, value in targets.items() if value is not None}
    if len(named) != 1:
        raise ValueError(
            "Name one target, filters, parameters or macs, not "
            f"{' and '.join(named) if named else 'none'}."
        )
    ((name, value),) = named.items()
    return name, integer(name, value, 1)


def _sizes(chain: Chain, image_shape: tuple[int, ...]) -> dict[str, int]:
    return {
        "filters": sum(chain.filters().values()),
        "parameters": count_parameters(chain.model),
        "macs": count_macs(chain.model, image_shape),
    }


def _endless(train: Dataset, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    loader = batches(train, batch_size, torch.Generator().manual_seed(seed))
    while True:
        yield from epoch(loader, train, batch_size)


def _train(
    chain: Chain,
    train: Dataset,
    stream: Iterator[tuple[Tensor, Tensor, float]],
    lr: float,
    seed: int,
    per_example: PerExample | None,
) -> Scores:
    """Train in place on the mini-batches of ``stream``; return scores from the same passes."""
    precision = mixed_precision(chain.model, train)
    optimizer = torch.optim.Adam(chain.model.parameters(), lr)
    filters = chain.filters()
    mean = MeanOverExamples(per_example)
    maps: dict[str, Tensor] = {}
    total = 0.0

    def keep(layer: str, z: Tensor) -> Tensor | None:
        z, after = with_gradient(layer, z)
        z.retain_grad()
        maps[layer] = z
        return after

    watched = chain if per_example else replace(chain, links={})
    with in_training(chain.model, seed_of_rank(seed, train)), on_feature_maps(watched, keep):
        network = in_parallel(chain.model, train)
        for images, labels, divisor in stream:
            total += update(network, optimizer, images, labels, divisor, precision)
            if per_example and divisor < math.inf:
                check_found(chain, maps, len(images))
                mean.add(
                    {  # the gradient of each example's own loss, not of the mean
                        layer: by_position(_exact(z), _exact(z.grad) * divisor, filters[layer])
                        for layer, z in maps.items()
                    }
                )
            maps.clear()
    make_same(chain.model, train)
    loss = summed(train, chain.model, {"loss": float(total)})["loss"]
    if not math.isfinite(loss):  # on every rank alike
        raise FloatingPointError(f"The loss is {loss}: use an lr lower than {lr}.")
    return mean.scores(chain.model, train)


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
