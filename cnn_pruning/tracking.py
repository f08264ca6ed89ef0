"""Where MLflow keeps its things, and networks saved to and read from it.

``mlflow`` is imported where it is used: it takes two seconds.
"""

import copy
import logging
import os
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import TensorDataset
from torchinfo import summary

from cnn_pruning.data import batches
from cnn_pruning.model import CNN
from cnn_pruning.paths import ROOT
from cnn_pruning.training import Row, check_settings, evaluate, fit

if TYPE_CHECKING:
    import mlflow

EXPERIMENT = "cnn-pruning"
ANSWER_WITHIN = 5  # seconds that a tracking server has for its first answer


def connect() -> str:
    """Point MLflow at the project's runs and return the id of the project's experiment.

    The runs are where ``MLFLOW_TRACKING_URI`` says; without it, in an SQLite file at the
    repository's root, with their files in ``mlruns`` beside it. Both are made on first use, once,
    even when several processes start together.

    Raises ``ConnectionError`` within seconds if a tracking server doesn't answer, and
    ``ValueError`` if MLflow can't use the place.
    """
    default = ROOT / "mlflow.db"
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri == _address(default):  # set by an earlier call
        uri = None
    if uri and uri.startswith(("http://", "https://")):
        _check_answer(uri)

    import mlflow

    # The first use of a database reports on every one of its tables, and each artifact has a bar.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # would log a lock file as well
    mlflow.set_tracking_uri(uri or _address(default))
    try:
        if not uri and default.is_dir():
            raise IsADirectoryError(f"{default} is a folder")
        with FileLock(ROOT / ".mlflow.lock"):
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                files = None if uri else (ROOT / "mlruns").as_uri()
                mlflow.create_experiment(EXPERIMENT, artifact_location=files)
        return mlflow.set_experiment(EXPERIMENT).experiment_id
    except Exception as error:  # of MLflow, of its database, of the file system
        where = f"MLFLOW_TRACKING_URI={uri}" if uri else str(default)
        why = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"MLflow can't keep its runs at {where} ({why}).") from error


def _address(path: Path) -> str:
    return f"sqlite:///{path.as_posix()}"


@contextmanager
def run(name: str, parent: str | None = None) -> "Iterator[mlflow.ActiveRun]":
    """An MLflow run called ``name``, under the run with the id ``parent`` or else the active one.

    It ends as finished, as failed if the block raises, and as killed if it is interrupted.
    """
    import mlflow

    with mlflow.start_run(run_name=name, nested=True, parent_run_id=parent) as active:
        try:
            yield active
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise


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
    import mlflow

    from cnn_pruning import plots

    def log(row: Row) -> None:
        values = {name: value for name, value in row.items() if name != "epoch"}
        mlflow.log_metrics(values, step=row["epoch"])
        if on_epoch:
            on_epoch(row)

    mlflow.log_params({"channels": model.channels, **settings})
    for name, data in (("train", train), ("validation", val), ("test", test)):
        mlflow.log_input(_record(data, name), context=name)
    history = fit(model, train, val, on_epoch=log, **settings)
    test_loss, test_accuracy = evaluate(model, test)
    mlflow.log_metrics({"test_loss": test_loss, "test_accuracy": test_accuracy})
    mlflow.log_figure(plots.curves({"network": history}, "Training"), "training.png")
    log_network(model)
    return history


def _record(data: TensorDataset, name: str):
    """MLflow's description of a data set, with its digest."""
    import mlflow

    images, labels = (tensor.numpy() for tensor in data.tensors)
    return mlflow.data.from_numpy(images, targets=labels, name=name)


def log_network(model: CNN) -> None:
    """Log the summary of ``model``, its channel widths and its weights to the active run."""
    import mlflow

    device = next(model.parameters()).device
    mlflow.log_text(str(summary(model, (1, 1, 28, 28), verbose=0, device=device)), "summary.txt")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        torch.save({"channels": model.channels, "state_dict": model.state_dict()}, path)
        mlflow.log_artifact(path)


def load_network(run_id: str) -> CNN:
    """Return the network that ``log_network`` logged to that run, on the CPU.

    Raises ``mlflow.MlflowException`` if the run or its network isn't there.
    """
    import mlflow

    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="network.pt")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = CNN(saved["channels"])
    model.load_state_dict(saved["state_dict"])
    return model


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
    import mlflow

    check_settings(epochs, lr, seed)
    for data in (train, val, test):
        batches(data, batch_size)  # raises if it is empty
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CNN(channels)
    experiment = connect()
    settings = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "lr": lr}
    wanted = {"channels": tuple(channels), **settings}
    matches = [f"params.{name} = '{value}'" for name, value in wanted.items()]
    found = mlflow.search_runs(
        [experiment],
        " and ".join(
            [
                "tags.stage = 'baseline'",
                "attributes.status = 'FINISHED'",
                f"dataset.digest = '{_record(train, 'train').digest}'",
                *matches,
            ]
        ),
        output_format="list",
    )
    for candidate in found:
        try:
            return load_network(candidate.info.run_id), candidate.info.run_id
        except Exception:  # deleted, cut short, made by another version: train it again
            continue
    with run("cnn-pruning") as parent, run("train", parent.info.run_id) as active:
        fit_and_log(model, train, val, test, **settings)
        mlflow.set_tag("stage", "baseline")
    # Read back, so that the first call and the later ones return tensors of the same layout: other
    # layouts take other kernels, which round otherwise.
    return load_network(active.info.run_id), active.info.run_id


def parent_of(run_id: str) -> str | None:
    """Return the id of the run that the run ``run_id`` stands under."""
    import mlflow

    return mlflow.get_run(run_id).data.tags.get("mlflow.parentRunId")


def log_model(model: CNN, images: Tensor) -> None:
    """Log ``model`` to the active run in MLflow's own format, with the signature of ``images``.

    ``images`` are at least two examples, float32 (N, 1, 28, 28). The model takes any number.
    """
    import mlflow

    example = images.numpy()
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        logits = model(images).numpy()
    # It misses pip in environments that uv made.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # torch.export warns of its own doings
        warnings.filterwarnings("ignore", module="torch.export")
        mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=example,
            signature=mlflow.models.infer_signature(example, logits),
            # Named here, because MLflow takes many seconds to find it out.
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        )


def predict(run_id: str, images: Tensor) -> Tensor:
    """Return the labels, int64 (N,), that the model logged to that run gives to ``images``.

    ``images`` are float32 (N, 1, 28, 28). Raises ``mlflow.MlflowException`` if the run has no
    model that ``log_model`` logged.
    """
    import mlflow

    model = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    return torch.from_numpy(model.predict(images.numpy())).argmax(1)


def _check_answer(uri: str) -> None:
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=ANSWER_WITHIN).close()
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return  # it refuses this page, but it answers
        raise ConnectionError(
            f"The MLflow server at MLFLOW_TRACKING_URI={uri} does not answer ({error}): start it, "
            "or unset MLFLOW_TRACKING_URI to use the file mlflow.db."
        ) from error
