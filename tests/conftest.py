"""What takes long to start, started in the background before the first test of its file."""

import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before a test loads torch
os.environ["DO_NOT_TRACK"] = "true"  # MLflow's reports of its use, for which each process waits
# A shell that starts the tests in the background lets them ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
    signal.signal(getattr(signal, name), signal.SIG_DFL)


def asked_for(name, request):
    """Whether a test of this file uses the fixture ``name``; the others needn't wait for it."""
    items = (item for item in request.session.items if item.path == request.path)
    return any(name in item.fixturenames for item in items)


@pytest.fixture(scope="module", autouse=True)
def _processes(request):
    """Importing torch takes most of the time of a new process; here, it's done once for all."""
    methods = multiprocessing.get_all_start_methods()
    if asked_for("processes", request) and "forkserver" in methods:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cnn_pruning"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def _small_batches():
    """Scoring joins small batches. In tests it doesn't: most are about results of several ones."""
    from cnn_pruning import feature_maps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_maps, "JOINED", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _seeds_without_stacks():
    """Each ``torch.manual_seed`` is noted, with the stack, for GPUs that start later; there's none.

    The networks are so small that this would be a sixth of the time of their tests.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():
            for kind in (torch.cuda, torch.xpu, torch.mtia):
                patch.setattr(kind, "_lazy_call", lambda *_, **__: None)
        yield


@pytest.fixture(scope="session")
def processes():
    """The multiprocessing context in which processes start fast."""
    known = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder and the address of a store that the tests of a file share."""
    from stores import new_store  # takes seconds, which the other tests needn't wait for

    folder = tmp_path_factory.mktemp("shared")
    return folder, new_store(folder, tmp_path_factory)


@pytest.fixture
def store(shared, monkeypatch):
    """MLflow is connected to the shared store; each test looks at its own runs only."""
    from stores import no_figures, place

    from cnn_pruning import tracking

    no_figures(monkeypatch)
    with place(*shared):
        tracking.connect()
        yield


@pytest.fixture(scope="module", autouse=True)
def _server(request, tmp_path_factory):
    """An MLflow server of its own process, with its own store; its address and folder."""
    if not asked_for("server", request):
        yield
        return
    from stores import new_store

    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": new_store(folder, tmp_path_factory),
        "--artifacts-destination": str(folder / "served"),
    }
    arguments = [argument for option in options.items() for argument in option]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if "MLFLOW" not in name}
            | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}", folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def server(_server):
    """The address of the MLflow server, which answers, and its folder."""
    process, uri, folder = _server
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(3000):
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            direct.open(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    return uri, folder


@pytest.fixture(scope="module", autouse=True)
def _commands(request, tmp_path_factory):
    """The command under torchrun on few images, once whole and once with a rank that dies."""
    if not asked_for("commands", request):
        yield
        return
    from stores import new_store

    folder = tmp_path_factory.mktemp("commands")
    uri = new_store(folder, tmp_path_factory)
    tests = os.path.dirname(__file__)
    options = "--channels 2 3 --remove 2 --epochs 1 --fine-tune-epochs 1 --batch-size 20".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    started = {
        ends: subprocess.Popen(
            [*torchrun, os.path.join(tests, "few_images.py"), ends, *options],
            cwd=folder,
            env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": os.path.dirname(tests)},
            stdout=(folder / f"{ends}.out").open("w"),
            stderr=(folder / f"{ends}.err").open("w"),
        )
        for ends in ("well", "badly")
    }
    try:
        yield started, folder, uri
    finally:
        for process in started.values():
            process.terminate()
            process.wait()


@pytest.fixture
def commands(_commands):
    """The exit status and the texts of each command, by how it ends; and the store's address."""
    started, folder, uri = _commands
    ended = {}
    for ends, process in started.items():
        process.wait(300)
        texts = [(folder / f"{ends}.{name}").read_text() for name in ("out", "err")]
        ended[ends] = (process.returncode, *texts)
    return ended, uri
