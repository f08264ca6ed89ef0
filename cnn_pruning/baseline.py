"""The trained network that the notebooks prune: read from the tracking store, or trained."""

from collections.abc import Callable

import torch
from torch.utils.data import TensorDataset

from cnn_pruning import tracking
from cnn_pruning.data import batches
from cnn_pruning.model import CNN
from cnn_pruning.training import Row, check_settings, evaluate, fit


def baseline(
    train: TensorDataset,
    val: TensorDataset,
    test: TensorDataset,
    channels: tuple[int, ...] = (8, 16),
    seed: int = 0,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 3e-3,
) -> tuple[CNN, str]:
    """Return the network trained with these settings, on the CPU, and the id of its run.

    It is read from the newest finished run with the same settings and training data. If there is
    none, or its network can't be read, the network is trained and logged. ``seed`` draws the first
    weights as well as the order of the mini-batches, and leaves the caller's random numbers as they
    are; the other settings are those of ``fit``.

    Raises ``ValueError`` for settings that ``fit`` can't use, before there is a run.
    """
    check_settings(epochs, lr, seed)
    for data in (train, val, test):
        batches(data, batch_size)  # raises if it is empty
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CNN(channels)
    settings = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    for run_id in tracking.find_baselines({"channels": tuple(channels), **settings}, train):
        try:
            return tracking.load_network(run_id), run_id
        except Exception:  # deleted, cut short, made by another version: train it again
            continue
    with tracking.run("cnn-pruning") as parent, tracking.run("train", parent.info.run_id) as active:
        fit_and_log(model, train, val, test, **settings)
        tracking.mark_as_baseline()
    return tracking.load_network(active.info.run_id), active.info.run_id


def fit_and_log(
    model: CNN,
    train: TensorDataset,
    val: TensorDataset,
    test: TensorDataset,
    on_epoch: Callable[[Row], None] | None = None,
    **settings: int | float,
) -> list[Row]:
    """``fit`` with ``settings``, everything logged to the active run; returns the history.

    Logged are the settings and channels as parameters, ``train_loss``, ``val_loss`` and
    ``val_accuracy`` by epoch and their curves, ``test_loss`` and ``test_accuracy`` once at the end,
    the summary and the network.
    """
    from cnn_pruning import plots  # matplotlib takes a second to import

    def log(row: Row) -> None:
        values = {name: value for name, value in row.items() if name != "epoch"}
        tracking.log_metrics(values, step=row["epoch"])
        if on_epoch:
            on_epoch(row)

    tracking.log_settings(
        {"channels": model.channels, **settings}, train=train, validation=val, test=test
    )
    history = fit(model, train, val, on_epoch=log, **settings)
    test_loss, test_accuracy = evaluate(model, test)
    tracking.log_metrics({"test_loss": test_loss, "test_accuracy": test_accuracy})
    tracking.log_figure(plots.curves({"network": history}, "Training"), "training.png")
    tracking.log_network(model)
    return history
