"""The runs in MLflow: where they are kept, and how they are logged, found and read.

``mlflow`` is imported where it is used, because the import takes two seconds.
"""

import copy
import logging
import os
import shlex
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import TensorDataset
from torchinfo import summary

from cnn_pruning.model import CNN
from cnn_pruning.paths import ROOT
from cnn_pruning.ranks import first_alone

if TYPE_CHECKING:
    import mlflow
    from matplotlib.figure import Figure
    from mlflow.data.numpy_dataset import NumpyDataset

EXPERIMENT = "cnn-pruning"
ANSWER_WITHIN = 5  # seconds that a tracking server has for its first answer
SERVER = ("http://", "https://")
SQLITE = "sqlite:///"


# Where the runs are


def _default_uri() -> str:
    return SQLITE + (ROOT / "mlflow.db").as_posix()


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


def _make_database(path: Path) -> None:
    """Make an empty database at ``path``, whole or not at all.

    MLflow takes seconds to make one, and can't use one that it was stopped in making.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix="mlflow.db-", ignore_cleanup_errors=True
    ) as folder:
        new = Path(folder) / path.name
        store = SqlAlchemyStore(SQLITE + new.as_posix(), (path.parent / "mlruns").as_uri())
        store.engine.dispose()  # closes the file
        new.replace(path)


def connect() -> str:
    """Point MLflow at the project's runs and return the id of the project's experiment.

    The environment variable ``MLFLOW_TRACKING_URI`` says where the runs are. Without it, they are
    in an SQLite file at the repository's root, and their files are in ``mlruns`` beside it. The
    first call makes both. They are made once, even when several processes start together.

    Raises ``ConnectionError`` within seconds if a tracking server doesn't answer, and
    ``ValueError`` if MLflow can't use the place. Nothing is left behind then.
    """
    default = _default_uri()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or default
    if uri.startswith(SERVER):
        _check_answer(uri)

    import mlflow

    # The first use of a database reports on each of its tables, and each artifact has a bar.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # would log a lock file as well
    mlflow.set_tracking_uri(uri)
    lock = ROOT / ".mlflow.lock"
    is_first_use = not lock.exists()
    path = Path(uri.removeprefix(SQLITE))
    try:
        if uri.startswith(SQLITE) and path.is_dir():  # MLflow would try again for minutes
            raise IsADirectoryError("that is a folder")
        with FileLock(lock):
            if uri == default and not path.exists():
                _make_database(path)
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                files = (ROOT / "mlruns").as_uri() if uri == default else None
                mlflow.create_experiment(EXPERIMENT, artifact_location=files)
        return mlflow.set_experiment(EXPERIMENT).experiment_id
    except Exception as error:  # of MLflow, of its database, of the file system
        if is_first_use:
            with suppress(OSError):
                lock.unlink()
        place = str(path) if uri == default else f"MLFLOW_TRACKING_URI={uri}"
        why = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise ValueError(f"MLflow can't keep its runs at {place} ({why}).") from error


def where_to_look(active: "mlflow.ActiveRun") -> str:
    """Return two lines: how to see the runs in a browser, and which run this is and where."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    # Without the last part, MLflow opens on a page for language models, which is empty here.
    page = f"#/experiments/{active.info.experiment_id}/runs"
    if uri.startswith(SERVER):
        how = f"open {uri.rstrip('/')}/{page}"
    elif uri == _default_uri():
        how = f"type `uv run mlflow ui` in {ROOT} and open http://127.0.0.1:5000/{page}"
    else:
        command = f"uv run mlflow ui --backend-store-uri {shlex.quote(uri)}"
        how = f"type `{command}` and open http://127.0.0.1:5000/{page}"
    return f"To see the runs, {how}\nMLflow run {active.info.run_id}, in {uri}"


# Runs


@first_alone
@contextmanager
def run(name: str, parent: str | None = None) -> "Iterator[mlflow.ActiveRun]":
    """Start an MLflow run called ``name`` for the block.

    It stands under the run with the id ``parent``, or else under the active run, if there is one.
    Its status is finished at the end, failed if the block raises, killed if it is interrupted.
    """
    import mlflow

    with mlflow.start_run(run_name=name, nested=True, parent_run_id=parent) as active:
        try:
            yield active
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise


def parent_of(run_id: str) -> str | None:
    """Return the id of the run that the run ``run_id`` stands under, or None."""
    import mlflow

    return mlflow.get_run(run_id).data.tags.get("mlflow.parentRunId")


def _described(data: TensorDataset, name: str) -> "NumpyDataset":
    import mlflow

    images, labels = (tensor.numpy() for tensor in data.tensors)
    return mlflow.data.from_numpy(images, targets=labels, name=name)


def find_runs(stage: str, settings: Mapping[str, object], train: TensorDataset) -> list[str]:
    """Return the ids of the finished runs of a stage with these settings, the newest first.

    They are runs whose stage was named by ``set_stage``, whose parameters have the values in
    ``settings``, and to which ``train`` was logged by ``log_data``.
    """
    import mlflow

    conditions = [
        f"tags.stage = '{stage}'",
        "attributes.status = 'FINISHED'",
        f"dataset.digest = '{_described(train, 'train').digest}'",
        *(f"params.{name} = '{value}'" for name, value in settings.items()),
    ]
    found = mlflow.search_runs(
        experiment_names=[EXPERIMENT],
        filter_string=" and ".join(conditions),
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    return [each.info.run_id for each in found]


# What is logged to the active run; of several processes that work together, by the first


@first_alone
def set_stage(stage: str) -> None:
    """Name the stage of the experiment, by which ``find_runs`` finds the active run."""
    import mlflow

    mlflow.set_tag("stage", stage)


@first_alone
def log_settings(settings: Mapping[str, object]) -> None:
    """Log settings, by name, as parameters."""
    import mlflow

    mlflow.log_params(dict(settings))


@first_alone
def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers, by name, as metrics; ``step`` is the epoch or the removal they belong to."""
    import mlflow

    mlflow.log_metrics(dict(metrics), step)


@first_alone
def log_data(data: TensorDataset, name: str) -> None:
    """Log what a data set is, not its examples: name, shapes, and a digest of the values."""
    import mlflow

    mlflow.log_input(_described(data, name), context=name)


@first_alone
def log_dict(values: dict, path: str) -> None:
    """Log ``values`` as a JSON file."""
    import mlflow

    mlflow.log_dict(values, path)


@first_alone
def log_figure(figure: "Figure", path: str) -> None:
    """Log a figure as a PNG file."""
    import mlflow

    mlflow.log_figure(figure, path)


# Networks


@first_alone
def log_network(model: CNN) -> None:
    """Log the summary of ``model``, its channels and its weights."""
    import mlflow

    device = next(model.parameters()).device
    counted = summary(model, (1, *model.IMAGE_SHAPE), verbose=0, device=device)
    mlflow.log_text(str(counted), "summary.txt")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        torch.save({"channels": model.channels, "state_dict": model.state_dict()}, path)
        mlflow.log_artifact(path)


def load_network(run_id: str) -> CNN:
    """Return the network that ``log_network`` logged to the run ``run_id``, on the CPU.

    Raises ``mlflow.MlflowException`` if the run or its network doesn't exist.
    """
    import mlflow

    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="network.pt")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = CNN(saved["channels"])
    model.load_state_dict(saved["state_dict"])
    return model


@first_alone
def log_model(model: CNN, images: Tensor) -> None:
    """Log ``model`` in MLflow's own format, which others can use without this package.

    ``images`` are at least two examples, float32 (N, 1, 28, 28). They show MLflow what the model
    takes and returns. The logged model takes any number of images.
    """
    import mlflow

    example = images.numpy()
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        logits = model(images).numpy()
    # MLflow warns where pip is missing, and pip is missing from environments that uv makes.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.export")  # about its own internals
        mlflow.pytorch.log_model(
            model,
            name="model",
            input_example=example,
            signature=mlflow.models.infer_signature(example, logits),
            # Named here, because MLflow takes many seconds to find it out.
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        )


def predict(run_id: str, images: Tensor) -> Tensor:
    """Return the labels, int64 (N,), that the model in the run ``run_id`` gives to ``images``.

    ``images`` are float32 (N, 1, 28, 28). Raises ``mlflow.MlflowException`` if ``log_model`` logged
    no model to the run.
    """
    import mlflow

    model = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    return torch.from_numpy(model.predict(images.numpy())).argmax(1)
