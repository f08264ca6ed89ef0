"""Training and evaluation."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from cnn_pruning.data import batches
from cnn_pruning.progress import progress

Row = dict[str, int | float]


def fit(
    model: nn.Module,
    train: Dataset,
    val: Dataset,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    on_epoch: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train ``model`` in place with Adam and cross-entropy; return one row an epoch.

    The learning rate falls linearly, update by update, from ``lr`` to a hundredth of it.

    A row holds ``epoch`` (from 1), ``train_loss`` (nats, the mean over the epoch's examples, while
    the network learns), ``val_loss`` (nats) and ``val_accuracy`` (a fraction), measured after the
    epoch.
    ``on_epoch`` is called with each row as soon as it is known. The order of the mini-batches and
    what dropout draws depend on ``seed`` alone; the caller's random numbers are untouched. The
    optimizer is new on each call, so it holds no removed filter.

    The model stays on its device, and its training flags are as before. If training fails, its
    weights are as before too; if it is interrupted (Ctrl-C), they are those reached. Its
    convolutions are laid out channels last, which is faster on a CPU and changes no value. On a
    CPU with instructions for bfloat16 the updates use mixed precision (``mixed_precision``).

    Raises ``ValueError`` for epochs, batch size or learning rate out of range, and what
    ``evaluate`` raises for data that can't be used, all before the model changes;
    ``FloatingPointError`` if the loss stops being finite.
    """
    check_settings(epochs, lr, seed)
    loader = batches(train, batch_size, torch.Generator().manual_seed(seed))
    evaluate(model, val)  # raises, if it must, before the model changes
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=max(1, steps))
    history = []
    before = copy.deepcopy(model.state_dict())
    devices = [device] if device.type == "cuda" else []
    with (
        training_flags(model),
        torch.random.fork_rng(devices),
        progress(steps, "training") as advance,
    ):
        torch.manual_seed(seed)  # for dropout
        try:
            for epoch in range(1, epochs + 1):
                train_loss = _epoch(model, loader, optimizer, schedule, advance) / len(train)
                val_loss, val_accuracy = evaluate(model, val)
                if not math.isfinite(train_loss + val_loss):
                    raise FloatingPointError(
                        f"The loss is {train_loss} in training and {val_loss} in validation in "
                        f"epoch {epoch}: use a learning rate lower than {lr}, and check the data."
                    )
                row = {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "val_loss": val_loss,
                    "val_accuracy": val_accuracy,
                }
                history.append(row)
                if on_epoch:
                    on_epoch(dict(row))
        except Exception:
            model.load_state_dict(before)
            raise
        finally:
            model.zero_grad()
    return history


def _epoch(model, loader, optimizer, schedule, advance) -> float:
    """Train for one epoch; return the loss summed over the examples."""
    model.train()
    total = 0.0
    device = next(model.parameters()).device
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with mixed_precision(device):
            logits = model(images)
        loss = summed_loss(logits, labels)
        (loss / len(labels)).backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
        advance()
    return float(total)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a block in which a float32 network multiplies in bfloat16, where that is faster.

    That is on CPUs with AVX512-BF16 instructions, where it takes a third off an epoch; elsewhere
    the block changes nothing. Weights, optimizer and loss stay float32.
    """
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def check_settings(epochs: int, lr: float, seed: int) -> None:
    """Raise ``ValueError`` if ``fit`` can't train with these."""
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"epochs must be an integer of 0 or more, but it is {epochs!r}.")
    if not isinstance(lr, int | float) or not (0 < lr < math.inf):
        raise ValueError(f"lr must be a positive number, but it is {lr!r}.")
    if type(seed) is not int:
        raise ValueError(f"seed must be an integer, but it is {seed!r}.")


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (nats), summed over the examples, at least in float32.

    ``logits`` (N, classes), ``labels`` integers (N,). Raises ``ValueError`` for other labels.
    """
    check_labels(logits, labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, labels, reduction="sum")


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless each example has an integer label of one of the classes."""
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"The labels must be int64 ({len(logits)},), but they are {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    low, high = labels.aminmax()
    if low < 0 or high >= logits.shape[1]:  # cross_entropy would skip a label of -100
        raise ValueError(
            f"The labels must be from 0 to {logits.shape[1] - 1}, one for each output of the "
            f"network, but they go from {low} to {high}."
        )


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, batch_size: int = 128) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy (a fraction) of ``model`` on ``data``.

    The model is in evaluation mode meanwhile, and its training flags are as before afterwards.
    Raises ``TypeError`` or ``ValueError`` for what ``batches`` refuses, and ``ValueError`` for
    labels that aren't integers of one of the classes.
    """
    device = next(model.parameters()).device
    loss, correct = 0.0, 0
    with training_flags(model):
        model.eval()
        for images, labels in batches(data, batch_size):
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += summed_loss(logits, labels).item()
            correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(data), correct / len(data)


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module of ``model`` at the end of the block."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
