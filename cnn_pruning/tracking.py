"""The runs in MLflow: where they are kept, and how they are logged, found and read."""

import copy
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock
from urllib.parse import quote, unquote, urlencode
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchinfo import summary

from cnn_pruning.experiments import alive
from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.model import CNN
from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.experiments.ranks import first_alone
from cnn_pruning.measure import count_parameters
from cnn_pruning.network.description import CONV

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import ActiveRun

EXPERIMENT = "cnn-pruning"  # where the user has set no other
ANSWER_WITHIN = 5  # seconds that a tracking server has for its first answer
WITHIN, SLOWEST = 60, 100_000  # seconds for anything else, and bytes a second for a network
SERVER = ("http://", "https://")
SQLITE = "sqlite:///"
# Tags of a run: the digests of its network's and its model's file, and the lock that it holds.
DIGEST, MODEL_DIGEST, LOCK = "network_sha256", "model_sha256", "cnn_pruning.lock"
# The server whose address had a login, and this login.
LOGIN = ("CNN_PRUNING_LOGIN_OF", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
# "user:password@", also where the password has a slash, which it shouldn't.
IN_ADDRESS = r"://([^/\s]*|[^\s/@:]+:(?!\d+/)[^\s@]*)@"
MODEL = "model/data/model.pt2"  # the file of a model in MLflow's own format
NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
# Four tries, the last after 24 seconds, all within a minute; by default MLflow tries for more than
# four minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}
ONE_TRY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
# Otherwise each file would have a progress bar, a lock file would be logged as well, and each run
# on a server would print its address.
QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class _AtFirstUse:
    """``mlflow``, imported when something of it is used, because that takes two seconds."""

    def __getattr__(self, name: str) -> object:
        try:
            Path.home()
        except RuntimeError:  # nobody knows the user, whose home MLflow wants to know
            os.environ["HOME"] = tempfile.gettempdir()
        return getattr(importlib.import_module("mlflow"), name)


mlflow = _AtFirstUse()


class NotRecorded(OSError):
    """MLflow could not record a run; the message says which, why, and where its network is."""


# Where the runs are


def _default_uri() -> str:
    return SQLITE + (ROOT / "mlflow.db").as_posix()


def _check_answer(uri: str) -> None:
    try:
        host = mlflow.utils.credentials.get_default_host_creds(uri)
        settings = {"max_retries": 0, "retry_codes": (), "timeout": ANSWER_WITHIN}
        with alive.deadline(ANSWER_WITHIN):
            answer = mlflow.utils.rest_utils.http_request(host, "/health", "GET", **settings)
        if answer.status_code >= 500:  # below, it refuses this page, but it answers
            raise ConnectionError(f"{answer.status_code} {answer.reason}")
    except Exception as error:
        raise ConnectionError(
            f"The MLflow server at MLFLOW_TRACKING_URI={_shown(uri)} does not answer "
            f"({_reason(error)}): check it, or unset MLFLOW_TRACKING_URI to use the file mlflow.db."
        ) from None


def _login_apart(uri: str) -> str:
    """Tell MLflow apart from the address of a server who logs in, so that nothing shows it."""
    plain = _shown(uri)
    if os.environ.get(LOGIN[0], plain) != plain:  # that of another server
        for name in LOGIN:
            os.environ.pop(name, None)
    login = re.search(IN_ADDRESS, uri)
    if not uri.startswith(SERVER) or not login:
        return uri
    user, _, password = login[1].partition(":")
    os.environ.update(zip(LOGIN, (plain, unquote(user), unquote(password)), strict=True))
    return plain


def _shown(text: str) -> str:
    """``text`` without the user and the password in an address of a server or database."""
    text = re.sub(IN_ADDRESS, "://", text)
    return re.sub(r"(?i)\b(user|username|password|passwd)=[^&\s'\")]*", r"\1=...", text)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def _folder_of_this_machine() -> Path:
    """Where the runs that go on here have their locks, and networks lie until MLflow has them.

    That is beside a database file, and in the user's home for a server.
    """
    uri = mlflow.get_tracking_uri()
    if path := _sqlite_path(uri):
        return Path(f"{path}.running")
    homes = Path.home(), Path(tempfile.gettempdir())
    home = next(each for each in homes if os.access(each, os.W_OK))
    return home / ".cnn-pruning" / quote(_shown(uri).partition("://")[2], safe="")


def _make_database(path: Path, files: str) -> None:
    """Make an empty database, whole: MLflow can't use one that it was stopped in making.

    ``files`` is MLflow's place for files of runs.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    half = _folder_of_this_machine() / "half"
    shutil.rmtree(half, ignore_errors=True)  # of a start that was killed
    half.mkdir()
    try:
        new = half / path.name
        SqlAlchemyStore(SQLITE + new.as_posix(), files).engine.dispose()  # closes the file
        new.replace(path)
    finally:
        shutil.rmtree(half)


def connect() -> str:
    """Point MLflow at the project's runs and return the id of the experiment they are in.

    The environment variable ``MLFLOW_TRACKING_URI`` says where the runs are. Without it, they are
    in an SQLite file at the repository's root, and their files are in ``mlruns`` beside it. The
    first call makes both. They are made once, even when several processes start together. The
    experiment is the one that you have set in MLflow's ways, or else "cnn-pruning".

    Runs of this machine whose process died are marked as killed, and their networks are logged.

    Raises ``ConnectionError`` within seconds if a tracking server doesn't answer, and
    ``ValueError`` if MLflow can't use the place. Nothing is left behind then.
    """
    uri = _login_apart(os.environ.get("MLFLOW_TRACKING_URI") or _default_uri())
    if uri.startswith(SERVER):
        _check_answer(uri)
    os.environ.update({**PATIENCE, **QUIET, **os.environ})  # what the user has set wins
    mlflow.set_tracking_uri(uri)
    for name in ("alembic", "mlflow.store"):  # a new database reports on each of its tables
        logging.getLogger(name).setLevel(logging.WARNING)
    path, folder = _sqlite_path(uri), _folder_of_this_machine()
    try:
        if path and path.is_dir():  # MLflow would try again for minutes
            raise IsADirectoryError("that is a folder")
        options = uri.partition("?")[2]
        cut = options and ("/" in options or "=" not in options)
        if path and (unquote(str(path)) != str(path) or cut):
            raise ValueError("an address can't hold the % or ? in this path: use another folder")
        with alive.alone(folder), alive.deadline(24 * 3600 if path else WITHIN):
            if path and not path.exists():
                _make_database(path, _files() or "./mlruns")
            experiment = _experiment()
            for lock in alive.the_dead(folder):
                _end("KILLED", lock)
                if (left := folder / lock / "network.pt").exists():
                    warnings.warn(f"The network of a killed run lies in {left}.", stacklevel=2)
                else:
                    shutil.rmtree(left.parent, ignore_errors=True)  # with half of one, perhaps
        return experiment
    except Exception as error:  # of MLflow, of its database, of the file system
        place = path if uri == _default_uri() else f"MLFLOW_TRACKING_URI={_shown(uri)}"
        raise ValueError(f"MLflow can't keep its runs at {place} ({_reason(error)}).") from None


def _files() -> str | None:
    """Where the files of runs in the default database are; elsewhere MLflow decides."""
    return (ROOT / "mlruns").as_uri() if mlflow.get_tracking_uri() == _default_uri() else None


def _experiment() -> str:
    """The id of the experiment that the user has set, or else of the project's."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    chosen = getattr(
        mlflow.tracking.fluent, "_active_experiment_id", None
    )  # by mlflow.set_experiment
    if chosen or (not name and (chosen := os.environ.get("MLFLOW_EXPERIMENT_ID"))):
        return chosen
    found = mlflow.get_experiment_by_name(name or EXPERIMENT)
    if found and found.lifecycle_stage != "active":
        kind = found.lifecycle_stage or "unknown"
        raise ValueError(f"its experiment {name or EXPERIMENT!r} is {kind}: restore it")
    if found:
        return found.experiment_id
    return mlflow.create_experiment(name or EXPERIMENT, artifact_location=_files())


def _end(status: str, lock: str, hand_over: bool = True) -> None:
    """Give the runs that hold ``lock`` their ``status`` if they go on, and MLflow their networks.

    A lock is known before its run, and there may be none: its process died before it began.
    """
    active = mlflow.active_run()
    if active and active.data.tags.get(LOCK) == lock:
        mlflow.end_run(status)
    condition = f"tags.`{LOCK}` = '{lock}'"
    for run in mlflow.search_runs([lock.partition(".")[0]], condition, output_format="list"):
        if run.info.status == "RUNNING":
            mlflow.MlflowClient().set_terminated(run.info.run_id, status)
        if hand_over and _kept(run).exists():
            with suppress(Exception):  # then it stays
                _hand_over(run)


def _reason(error: BaseException) -> str:
    """What ``error`` comes down to, short enough for a part of a sentence."""
    line = " ".join(_shown(str(error)).split("\n")[0].split()).rstrip(".:")
    if cause := re.search(r"Caused by .*?['\"](.+)['\"]\)", line):  # urllib3, at great length
        line = cause[1].split(": ")[-1]
    if isinstance(error, LookupError | AttributeError):  # which say a name, and no more
        line = f"{type(error).__name__} {line}"
    return (line if len(line) < 200 else f"{line[:200]}...") or type(error).__name__


def page(active: "ActiveRun", curves: bool = False) -> str:
    """Return the address, behind the server's, of the list of runs, or of their ``curves``: those
    of all runs under the parent of ``active`` on common axes.
    """
    # Without the last part, MLflow opens on a page for language models, which is empty here.
    runs = f"#/experiments/{active.info.experiment_id}/runs"
    if not curves:
        return runs
    under = active.data.tags.get("mlflow.parentRunId", active.info.run_id)
    # Sorted by a metric, runs stand beside each other, and not folded under their parent.
    order = {"compareRunsMode": "CHART", "orderByKey": "metrics.`val_accuracy`"}
    only = {"searchFilter": f"tags.`mlflow.parentRunId` = '{under}'"}
    return f"{runs}?{urlencode(order | only)}"


def where_to_look(active: "ActiveRun") -> str:
    """Return two lines: how to see the curves of a run's steps in a browser, and what run it is."""
    uri, there = _shown(mlflow.get_tracking_uri()), page(active, curves=True)
    if uri.startswith(SERVER):
        how = f"open {uri.rstrip('/')}/{there}"
    else:
        command, where = f"uv run mlflow ui --backend-store-uri {shlex.quote(uri)}", ""
        if uri == _default_uri():
            command, where = "uv run mlflow ui", f" in {ROOT}"
        how = f"type `{command}`{where} and open http://127.0.0.1:5000/{there}"
    return f"To see the curves, {how}\nMLflow run {active.info.run_id}, in {uri}"


# Runs


@contextmanager
def experiment(settings: Mapping[str, object]) -> Iterator["ActiveRun"]:
    """Start a run for the block, as ``run`` does, under which those of its steps stand.

    ``settings`` are its parameters and, in their order, its name. MLflow's list cuts names after
    some twenty letters: put first what tells it from others.
    """
    said = (
        f"{name} {'-'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in settings.items()
        if value is not None
    )
    name = f"{', '.join(said)}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    note = "One network, and below it the runs of its steps. The metrics are those of its last one."
    with run(name, note=note) as active:
        log_settings(settings)
        yield active


@first_alone
@contextmanager
def run(name: str, parent: str | None = None, note: str | None = None) -> Iterator["ActiveRun"]:
    """Start an MLflow run called ``name``, which its page describes by ``note``, for the block.

    It stands under the run with the id ``parent``, or else under the active run, if there is one.
    Where the run ``parent`` has one of this name already, the new one is called "``name`` (2)".
    Its status is finished at the end, failed if the block raises, killed if it is interrupted, by
    Ctrl-C or as ``signals_interrupt`` says. If the process dies without a word, the next
    ``connect`` marks the run as killed.

    Raises ``NotRecorded`` if MLflow fails: its server is gone, for example, or the disk is full.
    What the block itself raises comes through as it is.
    """
    with ExitStack() as until_it_ends, alive.signals_interrupt():
        with _recording(f"start the run {name!r}"):
            above = mlflow.get_run(parent) if parent else mlflow.active_run()
            within = above.info.experiment_id if above else _experiment()
            if parent:
                under = f"tags.`mlflow.parentRunId` = '{parent}'"
                found = mlflow.search_runs([within], under, output_format="list")
                taken = {each.info.run_name for each in found}
                names = (f"{name} ({number})" for number in itertools.count(2))
                name = next(each for each in itertools.chain([name], names) if each not in taken)
            lock = f"{within}.{uuid4().hex}"
            until_it_ends.enter_context(alive.held(_folder_of_this_machine(), lock))
        try:
            with _recording(f"start the run {name!r}"):
                place = {"experiment_id": within, "nested": True, "parent_run_id": parent}
                about = {"run_name": name, "tags": {LOCK: lock}, "description": note}
                active = mlflow.start_run(**place, **about)
            yield active
            with _recording(f"record the run {name!r}", active):
                _end("FINISHED", lock)
        except BaseException as error:
            _end_with(error, name, lock)
            raise


def _end_with(error: BaseException, name: str, lock: str) -> None:
    """End the run of ``lock`` because of ``error``, to which a note is added."""
    status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
    stays = isinstance(error, NotRecorded)  # which says where the network lies
    # The server may be what failed, and a second interrupt must not stop this.
    with alive.undisturbed(), mock.patch.dict(os.environ, ONE_TRY):
        try:
            with alive.deadline(ANSWER_WITHIN):
                _end(status, lock, hand_over=not stays)
            said = f"The run {name!r} is marked as {status}"
        except Exception:  # the next ``connect`` will mark it
            said = f"MLflow could not mark the run {name!r} as {status}"
    kept = _folder_of_this_machine() / lock / "network.pt"
    if kept.exists() and not stays:
        said += f", but its network lies in {kept}"
    error.add_note(f"{said}.")


@contextmanager
def _recording(
    what: str, active: "ActiveRun | None" = None, seconds: float = WITHIN
) -> Iterator[None]:
    """Turn into ``NotRecorded`` whatever MLflow raises in the block, which is its calls alone."""
    try:
        with alive.deadline(seconds):
            yield
    except NotRecorded:
        raise
    except Exception as error:
        kept = _kept(active) if active else None
        lies = f", but its network lies in {kept}" if kept and kept.exists() else ""
        raise NotRecorded(
            f"MLflow at {_shown(mlflow.get_tracking_uri())} could not {what} ({_reason(error)}): "
            f"what would follow is lost{lies}."
        ) from None


def _seconds_for(*given: object) -> float:
    """How long MLflow has for what is ``given``, networks among it."""
    networks = (value for value in given if isinstance(value, nn.Module))
    return WITHIN + sum(p.nbytes for each in networks for p in each.parameters()) / SLOWEST


def _recorded(function: Callable) -> Callable:
    """Let rank 0 alone call ``function``, which logs to the active run."""

    @first_alone
    @functools.wraps(function)
    def called(*args, **kwargs):
        active = mlflow.active_run()
        if active is None:
            raise ValueError("No run is active: log inside `with tracking.run(...)`.")
        with _recording(f"record the run {active.info.run_name!r}", active, _seconds_for(*args)):
            return function(*args, **kwargs)

    return called


@alive.deadline(WITHIN)
def parent_of(run_id: str) -> str | None:
    """Return the id of the run that the run ``run_id`` stands under, or None."""
    return mlflow.get_run(run_id).data.tags.get("mlflow.parentRunId")


@alive.deadline(WITHIN)
def find_runs(stage: str, settings: Mapping[str, object], *data: Dataset) -> list[str]:
    """Return the ids of the finished runs, the newest first, that ``set_stage`` gave this stage,
    whose parameters have the values in ``settings``, and to which ``log_data`` logged ``data``.
    """
    conditions = [
        f"tags.stage = '{stage}'",
        "attributes.status = 'FINISHED'",
        *(f"dataset.digest = '{_described(each, 'data').digest}'" for each in data),
        *(f"params.{name} = '{value}'" for name, value in settings.items()),
    ]
    wanted = " and ".join(conditions)
    found = mlflow.search_runs([_experiment()], wanted, output_format="list")  # newest first
    return [each.info.run_id for each in found]


@alive.deadline(WITHIN)
def metric(run_id: str, name: str) -> float:
    """Return the metric ``name`` of a run as it was logged last, NaN if it wasn't."""
    return mlflow.get_run(run_id).data.metrics.get(name, torch.nan)


# What is logged to the active run; of several processes that work together, by the first


# The stage of the experiment, by which ``find_runs`` finds the active run
set_stage = _recorded(lambda stage: mlflow.set_tag("stage", stage))
# As MLflow's own: parameters by name; metrics by name, with a step; values as a JSON file
log_settings = _recorded(lambda *given: mlflow.log_params(*given))
log_metrics = _recorded(lambda *given: mlflow.log_metrics(*given))
log_dict = _recorded(lambda *given: mlflow.log_dict(*given))


@_recorded
def log_result(model: nn.Module, metrics: Mapping[str, float]) -> None:
    """Log ``metrics`` and the size of ``model`` to the active run and to the one it stands under,
    which so has the results of its newest network.
    """
    size = {"filters": sum(widths(model)), "parameters": count_parameters(model)}
    active = mlflow.active_run()
    for run_id in (active.info.run_id, active.data.tags.get("mlflow.parentRunId")):
        if run_id:
            mlflow.log_metrics({**metrics, **size}, run_id=run_id)


@_recorded
def log_data(data: Dataset, name: str) -> None:
    """Log what a data set is, not its examples: name, shapes, and a digest of the values, of the
    first hundred where it isn't a TensorDataset.
    """
    mlflow.log_input(_described(data, name), context=name)


def _described(data: Dataset, name: str) -> "mlflow.data.Dataset":
    whole = isinstance(data, TensorDataset)
    images, labels = data.tensors if whole else next(iter(batches(data, 100)))
    return mlflow.data.from_numpy(images.numpy(), targets=labels.numpy(), name=name)


@_recorded
def log_figure(figure: "Figure", path: str) -> str:
    """Log a figure as a PNG file; return where it is, a path on this machine or an address."""
    mlflow.log_figure(figure, path)
    uri, active = mlflow.get_tracking_uri(), mlflow.active_run()
    if uri.startswith(SERVER):
        return f"{uri.rstrip('/')}/{page(active)}/{active.info.run_id}/artifacts"
    return mlflow.utils.file_utils.local_file_uri_to_path(mlflow.get_artifact_uri(path))


# Networks


def widths(model: nn.Module) -> tuple[int, ...]:
    """Return how many filters each convolution of ``model`` has."""
    return tuple(m.out_channels for m in model.modules() if isinstance(m, CONV))


def _kept(run: "mlflow.entities.Run") -> Path:
    """Where the network of a run lies on this machine until MLflow has it."""
    return _folder_of_this_machine() / run.data.tags.get(LOCK, run.info.run_id) / "network.pt"


def _hand_over(run: "mlflow.entities.Run") -> None:
    """Give MLflow the network that is kept of a run, and keep it no longer."""
    path, client = _kept(run), mlflow.MlflowClient()
    client.log_artifact(run.info.run_id, path)
    client.set_tag(run.info.run_id, DIGEST, _sha256(path))
    shutil.rmtree(path.parent)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@_recorded
def keep_network(model: nn.Module) -> Path:
    """Write ``model`` to this machine's disk, whole or not at all, and return where.

    There it stays if the active run is cut off. ``read_network`` reads it.
    """
    path = _kept(mlflow.active_run())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with (Path(folder) / "half").open("wb") as file:
            torch.save({"channels": widths(model), "state_dict": model.state_dict()}, file)
        return Path(file.name).replace(path)


@_recorded
def log_network(model: nn.Module) -> None:
    """Log the summary of ``model``, its channels and weights, and the digest of their file."""
    keep_network(model)
    device = next(model.parameters()).device
    size = (1, *model.IMAGE_SHAPE) if isinstance(model, CNN) else None
    mlflow.log_text(str(summary(model, size, verbose=0, device=device)), "summary.txt")
    _hand_over(mlflow.active_run())


def load_network(run_id: str, model: nn.Module | None = None) -> nn.Module:
    """Return the network that ``log_network`` logged to the run ``run_id``, as ``read_network``.

    Raises ``mlflow.MlflowException`` if the run or its network doesn't exist, and ``ValueError`` if
    the file isn't the one that was logged.
    """
    with tempfile.TemporaryDirectory() as folder, alive.deadline(_seconds_for(model)):
        return read_network(_fetched(run_id, "network.pt", DIGEST, folder), model)


def _fetched(run_id: str, file: str, tag: str, folder: str) -> Path:
    """Download a file of a run, which must be the one whose digest is in ``tag``."""
    digest = mlflow.get_run(run_id).data.tags.get(tag)
    path = Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{file}", dst_path=folder))
    if _sha256(path) != digest:
        raise ValueError("Its file is not the one that was logged: the SHA-256 sums differ.")
    return path


def read_network(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the network in the file ``path``, a ``CNN`` on the CPU. Raises ``ValueError`` if it
    has none.

    The weights of a network of your own go into ``model``, built with the widths it had, which is
    returned. Only tensors and numbers are read, never code.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        with torch.device("meta"):  # takes no memory, whatever the file says about widths
            new = CNN(saved["channels"]) if model is None else copy.deepcopy(model)
        new.load_state_dict(saved["state_dict"], assign=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch and pickle raise on what isn't theirs
        raise ValueError(f"{path} does not hold a network ({_reason(error)}).") from error
    if model is not None:
        model.load_state_dict(new.state_dict())
        return model
    return new.to(memory_format=torch.contiguous_format)  # in training, weights may lie otherwise


@_recorded
def log_model(model: nn.Module, images: Tensor) -> None:
    """Log ``model`` in MLflow's own format, which others can use without this package.

    ``images`` are at least two examples, float32 (N, 1, 28, 28). They show MLflow what the model
    takes and returns. The logged model takes any number of images.
    """
    # MLflow warns where pip is missing, and pip is missing from environments that uv makes.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", module="torch.export")  # about its own internals
        mlflow.pytorch.log_model(
            copy.deepcopy(model).cpu().eval(),
            name="model",
            input_example=images.numpy(),
            # Named here, because MLflow takes many seconds to find it out.
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        )
        run_id = mlflow.active_run().info.run_id
        path = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{MODEL}", dst_path=folder)
        mlflow.set_tag(MODEL_DIGEST, _sha256(Path(path)))


@alive.deadline(WITHIN)
def predict(run_id: str, images: Tensor) -> Tensor:
    """Return the labels, int64 (N,), that the model in the run ``run_id`` gives to ``images``.

    ``images`` are float32 (N, 1, 28, 28). Raises ``mlflow.MlflowException`` if ``log_model`` logged
    no model to the run, and ``ValueError`` if its file isn't the one that was logged. The file
    holds a graph of PyTorch's own operations; what lies beside it, code perhaps, isn't read.
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, NO_PICKLE):
        data = str(_fetched(run_id, MODEL, MODEL_DIGEST, folder).parent)
        pytorch = {"model_data": data, "pytorch_version": torch.__version__}
        (Path(folder) / "MLmodel").write_text(json.dumps({"flavors": {"pytorch": pytorch}}))
        model = mlflow.pytorch.load_model(folder)
    with torch.no_grad():
        return model(images).argmax(1)
