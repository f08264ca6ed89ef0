"""Training and evaluation."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
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

    A row holds ``epoch`` (from 1), ``train_loss`` (mean over the epoch's examples, while the
    network learns), ``val_loss`` and ``val_accuracy`` (a fraction), measured after the epoch.
    ``on_epoch`` is called with each row as soon as it is known. The order of the mini-batches and
    what dropout draws depend on ``seed`` alone; the caller's random numbers are untouched. The
    optimizer is new on each call, so it holds no removed filter.

    The model stays on its device, and its training flags are as before. Its convolutions are laid
    out channels last, which is faster on a CPU and changes no value.

    Raises ``ValueError`` for epochs, batch size or learning rate out of range, and
    ``FloatingPointError`` if the loss stops being finite.
    """
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"epochs must be an integer of 0 or more, but it is {epochs!r}.")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be a positive number, but it is {lr!r}.")
    loader = batches(train, batch_size, torch.Generator().manual_seed(seed))
    batches(val, batch_size)  # raises for an empty one before the model changes
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=max(1, steps))
    history = []
    devices = [device] if device.type == "cuda" else []
    with (
        training_flags(model),
        torch.random.fork_rng(devices),
        progress(steps, "training") as advance,
    ):
        torch.manual_seed(seed)  # for dropout
        for epoch in range(1, epochs + 1):
            model.train()
            total = torch.zeros((), device=device)
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(labels)
                advance()
            train_loss = total.item() / len(train)
            val_loss, val_accuracy = evaluate(model, val)
            if not math.isfinite(train_loss + val_loss):
                raise FloatingPointError(
                    f"The loss is {train_loss} in training and {val_loss} in validation in epoch "
                    f"{epoch}: use a learning rate lower than {lr}."
                )
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            }
            history.append(row)
            if on_epoch:
                on_epoch(row)
    model.zero_grad()
    return history


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy (a fraction) of ``model`` on ``data``.

    The model is in evaluation mode meanwhile, and its training flags are as before afterwards.
    """
    device = next(model.parameters()).device
    loss, correct = 0.0, 0
    with training_flags(model):
        model.eval()
        for images, labels in batches(data, batch_size):
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += cross_entropy(logits, labels, reduction="sum").item()
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
