"""Places where MLflow keeps runs, and what the tests log there."""

import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import urlsplit

import mlflow
import pytest
import torch
from filelock import FileLock
from networks import assert_same
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import CNN, plots, tracking


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (size,), generator=generator))


class Pairs(Dataset):
    """A dataset that is read item by item."""

    def __init__(self, data):
        self.pairs = [(image, int(label)) for image, label in data]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


SETTINGS = {"epochs": 1, "batch_size": 20, "lr": 1e-3}
SPLITS = dataset(60), dataset(30, seed=1), dataset(30, seed=2)
IMAGES = SPLITS[2].tensors[0]


def network(channels=(2, 3), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CNN(channels)


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def assert_equal_networks(left, right):
    assert_same(dict(left.state_dict()), dict(right.state_dict()))
    assert_same(logits(left), logits(right))


@contextmanager
def place(root, uri=None, cwd=None):
    """The repository's root is ``root``; MLflow's settings are put back at the end."""
    with mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            del os.environ[name]
        os.environ["HOME"] = str(root)  # where locks for a server lie
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
        if uri:
            os.environ["MLFLOW_TRACKING_URI"] = uri
        patch.setattr(tracking, "ROOT", root)
        patch.chdir(cwd or root)
        try:
            yield
        finally:
            while mlflow.active_run():  # left by a test that failed
                mlflow.end_run()


def first_use(tmp_path_factory):
    """The folder whose ``root`` holds a default store used from the folder ``cwd``.

    Made once for all tests and their processes, because a new database takes seconds. ``new.db``
    is its database as it was made.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each process has a folder of its own in that of all
    folder = base / "first-use"
    with FileLock(base / "first-use.lock"):
        if not folder.exists():
            (folder / "root").mkdir(parents=True)
            (folder / "cwd").mkdir()
            with place(folder / "root", cwd=folder / "cwd"):
                tracking.connect()
                with tracking.run("first"):
                    tracking.log_network(CNN((2,)))
            shutil.copy(folder / "root" / "mlflow.db", folder / "new.db")
    return folder


def new_store(folder, tmp_path_factory):
    """Make a store without the project's experiment in ``folder``; return its address."""
    uri = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
    shutil.copy(first_use(tmp_path_factory) / "new.db", folder / "mlflow.db")
    with place(folder, uri):  # the first use of an address settles where its files go
        client = mlflow.MlflowClient(uri)
        old = client.get_experiment_by_name(tracking.EXPERIMENT)
        client.rename_experiment(old.experiment_id, "another experiment")
    return uri


def no_figures(monkeypatch):
    """Drawing and saving a figure takes longer than training a small network."""
    for draw in ("curves", "score_bars"):
        monkeypatch.setattr(plots, draw, lambda *_, **__: None)
    monkeypatch.setattr(tracking, "log_figure", lambda *_: None)


def runs(uri=None):
    """All runs of the project, the oldest first."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])


def named(run):
    """The name of a run, "parent" for one that stands under no other."""
    return run.info.run_name if "mlflow.parentRunId" in run.data.tags else "parent"


def status(run_id):
    return mlflow.get_run(run_id).info.status


def artifacts(run_id, uri=None):
    return sorted(file.path for file in mlflow.MlflowClient(uri).list_artifacts(run_id))


@contextmanager
def silent_server():
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def no_server():
    with silent_server() as uri:
        pass
    yield uri


def wait_in_a_run(root, uri, ids):
    """For a process of its own: send the ids of two runs, one in the other, and go on with them."""
    with place(root, uri):
        tracking.connect()
        with tracking.run("outer") as outer, tracking.run("inner") as inner:
            for each in (outer, inner):
                with mock.patch.object(mlflow, "active_run", lambda each=each: each):
                    tracking.keep_network(network())
            ids.send([outer.info.run_id, inner.info.run_id])
            time.sleep(600)


@contextmanager
def gate(uri):
    """A server that hands on to the one at ``uri``, until its ``trouble`` is set to "refused",
    "silent", or a status and a page. ``asked`` counts what it is asked in trouble, ``logins`` says
    who asks; its ``uri``.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.asked += self.server.trouble is not None
            self.server.logins.add(self.headers.get("Authorization"))
            if self.server.trouble == "silent":
                self.server.over.wait()
                return
            if self.server.trouble:
                status, answer = self.server.trouble
            else:
                behind = HTTPConnection(urlsplit(uri).netloc)
                behind.request(self.command, self.path, body, dict(self.headers))
                found = behind.getresponse()
                status, answer = found.status, found.read()
                behind.close()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.trouble, server.asked, server.over = None, 0, threading.Event()
        server.logins = set()
        server.uri = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
