"""Training and evaluation."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from cnn_pruning.experiments import ranks
from cnn_pruning.experiments.alive import interrupts_come_again
from cnn_pruning.experiments.data import batches, epoch
from cnn_pruning.experiments.model import CNN
from cnn_pruning.experiments.progress import progress
from cnn_pruning.network import passes
from cnn_pruning.network.checks import check_function, integer, positive
from cnn_pruning.network.description import BATCH_NORM
from cnn_pruning.network.passes import Cost, Inputs

Row = dict[str, int | float]
WITH_STATISTICS = nn.modules.batchnorm._NormBase


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset, batch_size: int = 128, cost: Cost | None = None
) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy (a fraction) of ``model`` on ``data``.

    With ``cost``, as in ``filter_scores``, the first is its mean, and the accuracy is NaN unless
    outputs and labels are those of a classifier.

    The model is in evaluation mode meanwhile, and its training flags are as before afterwards.
    Several ranks evaluate together if ``data`` come from ``ranks.divide`` or ``ranks.pool``.
    Raises ``TypeError`` or ``ValueError`` for what ``batches`` refuses, and ``ValueError`` for
    images that the network can't take, outputs that aren't logits (N, classes), or labels that
    aren't integers of one of the classes.
    """
    loss, correct = 0.0, 0
    with ranks.together(data):
        device = passes.device_of(model)
        ranks.agree(data, cost=cost)
        with passes.evaluation(model):
            for images, labels in passes.pieces(batches(data, batch_size), device):
                outputs = passes.outputs_of(model, images)
                loss += passes.summed_loss(outputs, labels, cost).item()
                correct += _correct(outputs, labels)
        sums = ranks.summed(data, model, {"loss": loss, "correct": correct})
    return sums["loss"] / len(data), sums["correct"] / len(data)


def _correct(outputs: object, labels: object) -> float:
    tensors = isinstance(outputs, Tensor) and isinstance(labels, Tensor)
    classes = tensors and outputs.dim() == 2 and outputs.shape[1] > 1
    if classes and labels.dim() == 1 and not labels.is_floating_point():
        return (outputs.argmax(1) == labels).sum().item()
    return math.nan


def fit(
    model: nn.Module,
    train: Dataset,
    val: Dataset,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    on_epoch: Callable[[Row], None] | None = None,
    cost: Cost | None = None,
) -> list[Row]:
    """Train ``model`` in place with Adam and cross-entropy, or ``cost``; return one row an epoch.

    The learning rate falls linearly, update by update, from ``lr`` to a hundredth of it.

    A row holds ``epoch`` (from 1), ``train_loss`` (nats, the mean over the epoch's examples, while
    the network learns), ``val_loss`` (nats) and ``val_accuracy`` (a fraction), both after the
    epoch. ``on_epoch`` is called with each row as soon as it is known. ``seed`` alone decides the
    order of the mini-batches and what dropout draws; the caller's random numbers are untouched. The
    optimizer is new on each call, so it holds no removed filter.

    The model stays on its device, and its training flags and memory layout are as before. If
    training fails, its weights are as before too; if it is interrupted (Ctrl-C), they are those
    reached. The updates use ``mixed_precision``.

    Several ranks train together, through DistributedDataParallel, if ``train`` comes from
    ``ranks.divide``. The mini-batches are those of one process, of ``batch_size`` for all ranks
    together, and so are the gradients, weights and losses, to rounding. Two things differ: batch
    norm takes its statistics from each rank's part of a mini-batch (its running ones from rank 0's;
    ``nn.SyncBatchNorm``, on GPUs, takes them from all), and dropout draws for each rank apart. A
    rank that fails or is interrupted ends the training of the others as a failure.

    Raises ``ValueError`` for epochs, batch size or learning rate out of range, for a network
    without a parameter to train, for a last mini-batch of one image if batch norm can't take it,
    and what ``evaluate`` raises for data that can't be used, all before the model changes;
    ``FloatingPointError`` if the loss stops being finite, and ``ranks.RankLost``. What one rank
    can't use, or has other settings for, all ranks refuse.
    """
    with ranks.together(train):  # raises, if it must, before the model changes
        epochs, lr, seed = check_settings(epochs, lr, seed)
        ranks.agree(train, epochs=epochs, lr=lr, cost=cost)
        if on_epoch is not None:
            check_function("on_epoch", on_epoch, "row")
        batch_size = integer("batch_size", batch_size, 1)
        loader = batches(train, batch_size, torch.Generator().manual_seed(seed))
        evaluate(model, val, cost=cost)
        check_trainable(model, train, batch_size)
        precision = mixed_precision(model)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=max(1, steps))
    history, before = [], copy.deepcopy(model.state_dict())
    with (
        in_training(model, ranks.seed_of_rank(seed, train)),
        fast_layout(model),
        progress(steps, "training") as advance,
    ):
        try:
            network = ranks.in_parallel(model, train)
            for number in range(1, epochs + 1):
                total, stream = 0.0, epoch(loader, train, batch_size)
                for _ in range(len(loader)):
                    total += update(network, optimizer, stream, precision, cost)[0]
                    schedule.step()
                    advance()
                ranks.make_same(model, train)
                train_loss = ranks.summed(train, model, {"loss": float(total)})["loss"] / len(train)
                val_loss, val_accuracy = evaluate(model, val, cost=cost)
                if not math.isfinite(train_loss + val_loss):
                    raise FloatingPointError(
                        f"The loss is {train_loss} in training and {val_loss} in validation in "
                        f"epoch {number}: use a learning rate lower than {lr}, and check the data."
                    )
                row = {"epoch": number, "train_loss": train_loss}
                row |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
                history.append(row)
                with ranks.all_or_none(network):
                    if on_epoch is not None:
                        on_epoch(dict(row))
        except Exception:
            model.load_state_dict(before)
            raise
    return history


def update(
    model: nn.Module,
    optimizer: Optimizer,
    stream: Iterator[tuple[Inputs, object, float]],
    precision: torch.autocast,
    cost: Cost | None = None,
) -> tuple[Tensor, int, float]:
    """Make one step of ``optimizer`` on the next mini-batch of ``stream``, one of ``epoch``.

    Return its summed loss, a scalar; how many images it has; and its divisor. The gradients stay
    until the next step. They are those of the *mean* loss. The forward pass has the ``precision``
    of ``mixed_precision``.
    """
    device = passes.device_of(model)
    optimizer.zero_grad()
    parallel = isinstance(model, DistributedDataParallel)
    with ranks.meeting() if parallel else nullcontext():
        with ranks.all_or_none(model):
            images, labels, divisor = next(stream)
            images, labels = passes.on_device((images, labels), device)
        with ranks.all_or_none(model):
            with precision:
                outputs = passes.outputs_of(model, images)
            loss = passes.summed_loss(outputs, labels, cost)
        with nullcontext() if parallel else passes.differentiable(loss):
            (loss / divisor).backward()
    optimizer.step()
    counted = loss.detach() if divisor < math.inf else torch.zeros_like(loss)
    return counted, passes.size_of(images), divisor


@contextmanager
def in_training(model: nn.Module, seed: int) -> Iterator[None]:
    """``model`` is in training mode for the block, but for batch norms that are frozen and in
    evaluation mode; ``seed`` decides what dropout draws. No interrupt is ignored.

    Afterwards its flags and the caller's random numbers are as before, and no gradient is left.
    """
    device, frozen = passes.device_of(model), _frozen_norms(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        interrupts_come_again(),
        passes.evaluation(model),  # which restores the flags
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        model.train()
        for norm in frozen:
            norm.eval()
        try:
            yield
        finally:
            model.zero_grad()


def _frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Norms with statistics that are frozen as in transfer learning, in evaluation mode, too."""
    norms = (m for m in model.modules() if isinstance(m, WITH_STATISTICS) and not m.training)
    weights = ((norm, [p.requires_grad for p in norm.parameters()]) for norm in norms)
    # Of one without weights, only that the network around it trains says that it was frozen.
    return [norm for norm, own in weights if not any(own) and (own or model.training)]


@torch.no_grad()
def refresh_batch_norms(
    model: nn.Module, data: Dataset, batch_size: int = 128, images: int = 5_000
) -> None:
    """Take the running statistics of the batch norms of ``model`` anew, in place, from ``data``.

    Those of a network that has lost filters are stale. The new ones are the mean over the whole
    mini-batches among ``images`` examples, a fixed random part of ``data``; their labels play no
    part. Batch norms that are frozen stay, as in ``fit``, and those that no image reaches. The
    passes are those of a copy in evaluation mode; without batch norms, there are none.

    Every rank does the same with data from ``ranks.divide``, and all end with the same network.
    Raises ``ValueError`` as ``evaluate`` does; the statistics are then as they were.
    """
    images = integer("images", images, 1)
    loader = batches(ranks.own(data), batch_size, torch.Generator().manual_seed(0))
    frozen = _frozen_norms(model)
    trial = passes.copy_of(model).eval()
    norms = {
        norm: fresh
        for norm, fresh in zip(model.modules(), trial.modules(), strict=True)
        if isinstance(norm, BATCH_NORM) and norm.running_mean is not None and norm not in frozen
    }
    if not norms:
        return
    if isinstance(data, ranks.Shared) and not data.whole:
        raise ValueError("Every rank needs all of the data: use divide, not pool.")
    ranks.gathered(data, model, None)  # raises if the networks differ
    for fresh in norms.values():
        fresh.train().reset_running_stats()
        fresh.momentum = None  # the plain mean
    with ranks.together(data):
        for inputs, _ in islice(loader, max(1, min(images, len(data)) // batch_size)):
            passes.outputs_of(trial, passes.on_device(inputs, passes.device_of(model)))
    ranks.of_all(data, None)  # they meet
    for norm, fresh in norms.items():
        if fresh.num_batches_tracked:  # the passes reached it
            norm.load_state_dict(fresh.state_dict())
    ranks.make_same(model, data)


def mixed_precision(model: nn.Module) -> torch.autocast:
    """Return a block in which a float32 ``CNN`` multiplies in bfloat16, where that is faster.

    That is on CPUs with AVX512-BF16 instructions, where it takes a third off an epoch; elsewhere,
    and for other networks, whose ``forward`` may not take it, the block changes nothing. Weights,
    optimizer and loss stay float32.
    """
    fast = isinstance(model, CNN) and torch.cpu.get_capabilities().get("avx512_bf16", False)
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    return torch.autocast("cpu", torch.bfloat16, enabled=fast and plain)


@contextmanager
def fast_layout(model: nn.Module) -> Iterator[None]:
    """Lay out the weights of a ``CNN`` channels last for the block, which takes a quarter off.

    Other networks stay as they are: a ``view`` in their ``forward`` could fail on it.
    """
    known = isinstance(model, CNN)
    weights = [(p, p.stride()) for p in model.parameters() if known and p.dim() == 4]
    for weight, _ in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight, strides in weights:
            weight.data = weight.new_empty_strided(weight.shape, strides).copy_(weight.data)


def check_trainable(model: nn.Module, train: Dataset, batch_size: int) -> None:
    """Raise ``ValueError`` if ``model`` can't be trained on mini-batches of this size."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The network has no parameter to train: set requires_grad of those that should learn."
        )
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    several = train.ranks if isinstance(train, ranks.Shared) else 1
    sizes = min(batch_size, len(train)), len(train) % batch_size
    if norms and any(0 < size < 2 * several for size in sizes):
        trial = passes.copy_of(model)
        trial.train()
        with torch.random.fork_rng([]), torch.no_grad():
            images, _ = next(iter(batches(ranks.own(train), 1)))
            try:
                passes.outputs_of(trial, passes.on_device(images, passes.device_of(model)))
            except ValueError as error:
                raise ValueError(
                    f"{len(train)} images in mini-batches of {batch_size} leave one of a single "
                    f"image{' to a rank' if several > 1 else ''}, on which batch norm can't train: "
                    "use another batch_size."
                ) from error


def check_settings(epochs: int, lr: float, seed: int) -> tuple[int, float, int]:
    """Return the settings as Python's numbers; raise ``ValueError`` if ``fit`` can't use them."""
    return (
        integer("epochs", epochs, 0),
        positive("lr", lr),
        integer("seed", seed, -(2**63), 2**64 - 1),
    )
