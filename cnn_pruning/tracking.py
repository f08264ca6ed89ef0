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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

if TYPE_CHECKING:
    import mlflow
    from matplotlib.figure import Figure

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


def log_settings(settings: Mapping[str, object], **data: TensorDataset) -> None:
    """Log settings as parameters of the active run, and the data sets by what they are for."""
    import mlflow

    mlflow.log_params(dict(settings))
    for name, dataset in data.items():
        mlflow.log_input(_record(dataset, name), context=name)


def log_metrics(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log numbers to the active run."""
    import mlflow

    mlflow.log_metrics(dict(metrics), step=step)


def log_figure(figure: "Figure", name: str) -> None:
    """Log a figure to the active run, as a file of that name."""
    import mlflow

    mlflow.log_figure(figure, name)


def log_dict(values: Mapping, name: str) -> None:
    """Log ``values`` to the active run, as a JSON file of that name."""
    import mlflow

    mlflow.log_dict(dict(values), name)


def mark_as_baseline() -> None:
    """Let ``find_baselines`` find the active run."""
    import mlflow

    mlflow.set_tag("stage", "baseline")


def find_baselines(settings: Mapping[str, object], train: TensorDataset) -> list[str]:
    """Return the ids of the finished baseline runs with these settings and training data.

    The newest comes first. Connects to the store first, and raises as ``connect`` does.
    """
    import mlflow

    experiment = connect()
    matches = [f"params.{name} = '{value}'" for name, value in settings.items()]
    conditions = [
        "tags.stage = 'baseline'",
        "attributes.status = 'FINISHED'",
        f"dataset.digest = '{_record(train, 'train').digest}'",
        *matches,
    ]
    found = mlflow.search_runs([experiment], " and ".join(conditions), output_format="list")
    return [run.info.run_id for run in found]


def _record(data: TensorDataset, name: str) -> "mlflow.data.dataset.Dataset":
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


def store() -> str:
    """Return the address of the store."""
    import mlflow

    return mlflow.get_tracking_uri()


def address_of_runs() -> str:
    """Return what to type to see the runs, and where: MLflow opens on another, empty page."""
    uri = store()
    place = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    start = "" if uri.startswith("http") else f"type `uv run mlflow ui --backend-store-uri {uri}`, "
    return f"{start}open {place}/#/experiments/{connect()}/runs"


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
