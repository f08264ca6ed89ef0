"""The trained network that the notebooks share, found in MLflow or trained and logged there."""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import plots, tracking
from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.model import CNN
from cnn_pruning.experiments.ranks import is_first, own
from cnn_pruning.experiments.training import Row, check_settings, evaluate, fit

SAME_ACCURACY = 0.005  # what another machine's rounding can change


def fit_and_log(
    model: nn.Module,
    train: Dataset,
    val: Dataset,
    test: Dataset,
    on_epoch: Callable[[Row], None] | None = None,
    trained: int = 0,
    **settings: int | float,
) -> list[Row]:
    """Train ``model`` with ``fit`` and log everything to the active run; return the history.

    ``settings`` are those of ``fit``. They are logged as parameters, together with the channels.
    ``train_loss``, ``val_loss`` and ``val_accuracy`` are logged after each epoch, counted on from
    the ``trained`` ones, so that MLflow draws them behind those of the training before. At the end
    follow ``test_loss``, ``test_accuracy``, the learning curves, the summary and the network. The
    network is on this machine's disk, after each epoch, before MLflow is asked for anything.
    """

    def log(row: Row) -> None:
        tracking.keep_network(model)
        values = {name: value for name, value in row.items() if name != "epoch"}
        tracking.log_metrics(values, trained + row["epoch"])
        if on_epoch:
            on_epoch(row)

    tracking.log_settings({"channels": tracking.widths(model), **settings})
    for name, data in (("train", train), ("validation", val), ("test", test)):
        tracking.log_data(own(data), name)
    history = fit(model, train, val, on_epoch=log, **settings)
    test_loss, test_accuracy = evaluate(model, test)
    tracking.log_result(model, {"test_loss": test_loss, "test_accuracy": test_accuracy})
    if is_first():
        tracking.log_figure(plots.curves({"network": history}, "Training"), "training.png")
    tracking.log_network(model)
    return history


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

    The network is read from the newest finished run with the same settings, training and test
    data. If there is no such run, the network is trained and logged. A stored network
    that isn't the one of its run, by its digest, its channels or its accuracy, is left alone with a
    warning.

    ``seed`` decides the first weights as well as the order of the mini-batches. The caller's random
    numbers are untouched. The other settings are those of ``fit``.

    Raises ``ValueError`` for settings that ``fit`` can't use, and what ``batches`` raises for data
    that can't be used, both before a run starts. Raises what ``tracking.connect`` raises.
    """
    epochs, lr, seed = check_settings(epochs, lr, seed)
    for data in (train, val, test):
        batches(data, batch_size)  # raises if it is empty
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CNN(channels)
    settings = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "lr": lr}

    tracking.connect()
    wanted = {**settings, "channels": model.channels}
    for run_id in tracking.find_runs("baseline", wanted, train, test):
        try:
            return _stored(run_id, model.channels, test), run_id
        except Exception as error:  # deleted, damaged, exchanged: try an older run
            why = str(error).split("\n")[0]
            warnings.warn(f"The network stored in run {run_id} is not used: {why}", stacklevel=2)

    with tracking.experiment(wanted), tracking.run("train") as active:
        fit_and_log(model, train, val, test, **settings)
        tracking.set_stage("baseline")
    # Read it back, so that the first call returns what the later calls will return.
    return tracking.load_network(active.info.run_id), active.info.run_id


def _stored(run_id: str, channels: tuple[int, ...], test: TensorDataset) -> CNN:
    """The network of a run, if it has these channels and the accuracy that was logged."""
    model = tracking.load_network(run_id)
    if model.channels != channels:
        raise ValueError(f"It has {model.channels} filters, not {channels}.")
    logged, found = tracking.metric(run_id, "test_accuracy"), evaluate(model, test)[1]
    if not abs(found - logged) <= SAME_ACCURACY:  # nor if one is NaN
        raise ValueError(f"Its test accuracy is {found:.2%}, but {logged:.2%} was logged.")
    return model
