"""Prune a few filters at a time and train in between: the paper's own algorithm."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

from cnn_pruning import criteria
from cnn_pruning.chain import links
from cnn_pruning.data import batches
from cnn_pruning.feature_maps import on_feature_maps
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.progress import progress
from cnn_pruning.pruner import Scores, TaylorPruner, filter_scores, remove_filters
from cnn_pruning.training import check_labels, check_settings, evaluate, training_flags


@dataclass(frozen=True)
class Step:
    """What stands after one removal."""

    model: nn.Module
    """The network as it is now; the next step trains a copy of it."""
    removed: dict[str, list[int]]
    """What this step removed, by layer: indices of the *original* network."""
    kept: dict[str, list[int]]
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
    score_batches: int | None = None,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    criterion: str | criteria.PerExample = "taylor",
    image_shape: tuple[int, int, int] = (1, 28, 28),
    **options,
) -> Iterator[Step]:
    """Alternate ``updates`` of training with removing the ``per_step`` lowest filters.

    Goes on until no more than ``filters``, ``parameters`` or ``macs`` (one of them) remain, and
    yields a ``Step`` after every removal. ``model`` is never changed. Whoever stops early has, in
    the last step, a network that works; a last fine-tuning is left to the caller.

    The updates are Adam's, on mini-batches of ``batch_size`` from ``train`` in an order that
    ``seed`` draws, at the constant rate ``lr``. After each removal the optimizer is a new one: to
    carry Adam's moments of the surviving weights over made no difference that trials could show.

    The filters are scored by ``criterion`` in the passes of these updates, as in the paper, at no
    extra cost, if it is a mean over examples (``criteria.PER_EXAMPLE``, or a function). Otherwise,
    with ``score_batches``, or without updates, they are scored after the updates, on that many
    random mini-batches (on all of ``train``, if None). ``options`` are those of ``TaylorPruner``.

    Raises ``ValueError`` for a target that can't be reached or settings out of range, and
    ``TypeError`` if the network isn't a chain, all at the first step, before anything is trained.

    Source: Molchanov et al. 2017, Figure 1 and section 2.
    """
    targets = {"filters": filters, "parameters": parameters, "macs": macs}
    targets = {name: value for name, value in targets.items() if value is not None}
    if len(targets) != 1:
        raise ValueError(
            "Name one target, filters, parameters or macs, not "
            f"{' and '.join(targets) if targets else 'none'}."
        )
    for name, value in {"per_step": per_step, **targets}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, but it is {value!r}.")
    if type(updates) is not int or updates < 0:
        raise ValueError(f"updates must be an integer of 0 or more, but it is {updates!r}.")
    if score_batches is not None and (type(score_batches) is not int or score_batches < 1):
        raise ValueError(f"score_batches must be a positive integer, but it is {score_batches!r}.")
    check_settings(1, lr, seed)
    on_the_way = None
    if updates and score_batches is None:
        on_the_way = criterion if callable(criterion) else criteria.PER_EXAMPLE.get(criterion)
    ((name, target),) = targets.items()
    pruner = TaylorPruner(model, criterion, **options)
    _check_target(pruner, name, target, image_shape)
    evaluate(model, val)  # raises, if it must, before anything is trained

    generator = torch.Generator().manual_seed(seed)
    stream = _endless(batches(train, batch_size, generator))
    network = model
    sizes = _sizes(network, image_shape)
    kept = {layer: list(range(link.conv.out_channels)) for layer, link in links(model).items()}
    removable = sum(max(0, len(filters) - pruner.min_filters) for filters in kept.values())
    with progress(removable, "pruning") as advance:
        while sizes[name] > target:
            network = copy.deepcopy(network)
            scores = _train(network, islice(stream, updates), lr, seed, on_the_way)
            if on_the_way is None:
                some = train
                if score_batches is not None:
                    size = min(len(train), score_batches * batch_size)
                    some = Subset(train, torch.randperm(len(train), generator=generator)[:size])
                scores = filter_scores(network, some, criterion)
            pruner = TaylorPruner(network, criterion, **options)
            pruner.scores = scores
            room = sum(max(0, len(values) - pruner.min_filters) for values in scores.values())
            count = min(per_step, room, sizes[name] - target if name == "filters" else room)
            chosen = pruner.select(count)
            network = remove_filters(network, chosen)
            sizes = _sizes(network, image_shape)
            removed = {layer: [kept[layer][k] for k in ks] for layer, ks in chosen.items()}
            kept = {
                layer: [k for k in filters if k not in removed[layer]]
                for layer, filters in kept.items()
            }
            for _ in range(count):
                advance()
            val_loss, val_accuracy = evaluate(network, val)
            yield Step(
                network,
                removed,
                {layer: list(filters) for layer, filters in kept.items()},
                **sizes,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
            )


def _check_target(pruner: TaylorPruner, name: str, target: int, image_shape: tuple) -> None:
    spare = {
        layer: range(max(0, link.conv.out_channels - pruner.min_filters))
        for layer, link in links(pruner.model).items()
    }
    least = _sizes(remove_filters(pruner.model, spare), image_shape)[name]
    if target < least:
        raise ValueError(
            f"The network can't get down to {target} {name}: with "
            f"min_filters={pruner.min_filters} it keeps at least {least}."
        )


def _sizes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    return {
        "filters": sum(link.conv.out_channels for link in links(model).values()),
        "parameters": count_parameters(model),
        "macs": count_macs(model, image_shape),
    }


def _endless(loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _train(
    model: nn.Module,
    stream: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    seed: int,
    per_example: criteria.PerExample | None,
) -> Scores:
    """Train in place on the mini-batches of ``stream``; return scores from the same passes."""
    device = next(model.parameters()).device
    chain = links(model)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    maps: dict[str, Tensor] = {}
    totals: Scores = {}
    seen = 0

    def keep(layer: str, z: Tensor) -> None:
        z.retain_grad()
        maps[layer] = z

    with (
        training_flags(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        on_feature_maps(chain if per_example else {}, keep),
    ):
        torch.manual_seed(seed)  # for dropout
        model.train()
        for images, labels in stream:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            check_labels(logits, labels)
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"The loss is {loss.item()}: use an lr lower than {lr}.")
            for layer, z in maps.items():
                shape = (len(images), chain[layer].conv.out_channels, -1)
                slope = z.grad * len(images)  # of each example's own loss
                score = per_example(z.detach().reshape(shape), slope.reshape(shape))
                total = score.cpu().sum(0, dtype=torch.float64)
                totals[layer] = totals[layer] + total if layer in totals else total
            maps.clear()
            seen += len(images)
            optimizer.step()
    model.zero_grad()
    return {layer: total / seen for layer, total in totals.items()}
