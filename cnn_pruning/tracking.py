"""The runs in MLflow: where they are kept, and what is logged to them, found and read again.

``mlflow`` is imported where it is used, because the import takes two seconds.
"""

import contextlib
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
    from mlflow.data.numpy_dataset import NumpyDataset

EXPERIMENT = "cnn-pruning"
ANSWER_WITHIN = 5  # seconds that a tracking server has for its first answer
SERVER = ("http://", "https://")
SQLITE = "sqlite:///"

# Where the runs are


def connect() -> str:
    """Point MLflow at the project's runs and return the id of the project's experiment.

    The environment variable ``MLFLOW_TRACKING_URI`` says where the runs are kept. Without it, they
    are in an SQLite file at the repository's root, and their files are in ``mlruns`` beside it. The
    first use makes both, and makes them once, even when several processes start together.

    Raises ``ConnectionError`` within seconds if a tracking server doesn't answer, and
    ``ValueError`` if MLflow can't use the place. A place that can't be used stays as it was.
    """
    default = SQLITE + (ROOT / "mlflow.db").as_posix()
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
    try:
        if uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).is_dir():
            raise IsADirectoryError("it is a folder")  # MLflow would try for minutes
        with FileLock(lock):
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                files = (ROOT / "mlruns").as_uri() if uri == default else None
                mlflow.create_experiment(EXPERIMENT, artifact_location=files)
        return mlflow.set_experiment(EXPERIMENT).experiment_id
    except Exception as error:  # of MLflow, of its database, of the file system
        if is_first_use:
            with contextlib.suppress(OSError):
                lock.unlink()
        where = uri.removeprefix(SQLITE) if uri == default else f"MLFLOW_TRACKING_URI={uri}"
        why = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"MLflow can't keep its runs at {where} ({why}).") from error


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
