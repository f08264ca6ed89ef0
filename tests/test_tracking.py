import base64
import errno
import hashlib
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
import torch
from networks import assert_same, state_of
from stores import (
    IMAGES,
    SETTINGS,
    SPLITS,
    Pairs,
    artifacts,
    assert_equal_networks,
    first_use,
    gate,
    logits,
    named,
    network,
    new_store,
    no_figures,
    no_server,
    place,
    runs,
    silent_server,
    status,
    wait_in_a_run,
)
from torch import nn

from cnn_pruning import TaylorPruner, fit, tracking
from cnn_pruning.baseline import baseline, fit_and_log
from cnn_pruning.experiments.alive import deadline

# Where the runs are


def test_the_default_store_is_at_the_root_wherever_the_process_runs(tmp_path_factory):
    folder = first_use(tmp_path_factory)
    assert list((folder / "cwd").iterdir()) == []
    assert (folder / "root" / "mlflow.db").is_file()
    assert len(list((folder / "root" / "mlruns").rglob("network.pt"))) == 1


def test_the_default_store_is_found_again_with_its_runs(tmp_path, tmp_path_factory):
    folder = first_use(tmp_path_factory)
    with place(folder / "root", cwd=tmp_path):
        first, second = tracking.connect(), tracking.connect()
        assert first == second
        (only,) = runs()
        assert tracking.load_network(only.info.run_id).channels == (2,)
    assert list(tmp_path.iterdir()) == []


def test_the_address_in_the_environment_wins_over_the_default_store(tmp_path, tmp_path_factory):
    root, cwd = tmp_path / "root", tmp_path / "cwd"
    root.mkdir()
    cwd.mkdir()
    with place(root, new_store(cwd, tmp_path_factory), cwd=cwd):
        tracking.connect()
        with tracking.run("here") as active:
            tracking.log_network(network())
        assert [found.info.run_id for found in runs()] == [active.info.run_id]
    assert len(list((cwd / "mlruns").rglob("network.pt"))) == 1
    assert not (root / "mlflow.db").exists() and not (root / "mlruns").exists()


@contextmanager
def answering(words):
    """A server that says ``words`` to the first request."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(words)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@contextmanager
def dripping():
    """A server that sends a byte now and then, and never an answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(OSError):
                while not over.wait(0.05):
                    self.wfile.write(b"H")

        do_POST = do_GET

    over = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            over.set()
            server.shutdown()


def foreign_server():
    return answering(b"SSH-2.0-Server\r\n")


def overloaded_server():
    return answering(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def no_address():
    yield "http://127.0.0.1:port"


@pytest.mark.parametrize(
    "server", [no_server, silent_server, foreign_server, overloaded_server, no_address]
)
def test_a_server_that_does_not_answer_is_an_error_before_anything_is_made(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(tracking, "ANSWER_WITHIN", 0.5)
    with server() as uri, place(tmp_path, uri):
        with pytest.raises(ConnectionError) as error:
            tracking.connect()
        assert uri in str(error.value)
        assert "unset MLFLOW_TRACKING_URI" in str(error.value)
    assert list(tmp_path.iterdir()) == []


class Reached(Exception):
    """What comes behind the first question to a server."""


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "403 Forbidden", "404 Not Found"])
def test_a_server_that_refuses_a_page_answers(status, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow, "set_tracking_uri", failing(Reached()))
    words = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()
    with answering(words) as uri, place(tmp_path, uri), pytest.raises(Reached):
        tracking.connect()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nonsense://here", "unsupported URI"),
        ("sqlite:///folder", "is a folder"),
        ("sqlite:///text", "not a database"),
        (None, "is a folder"),
    ],
)
def test_a_place_that_mlflow_cannot_use_is_an_error_and_stays_as_it_was(uri, reason, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mlflow.db").mkdir()  # the default
    (tmp_path / "text").write_text("not a database")
    before = sorted(tmp_path.rglob("*"))
    with place(tmp_path, uri), pytest.raises(ValueError) as error:
        tracking.connect()
    assert (uri or str(tmp_path / "mlflow.db")) in str(error.value)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "text").read_text() == "not a database"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_no_database_is_left_that_was_not_finished(tmp_path, tmp_path_factory, monkeypatch, error):
    def stop(uri, _):
        Path(uri.removeprefix("sqlite:///")).write_text("half a database")
        raise error

    finished = first_use(tmp_path_factory) / "root" / "mlflow.db"
    with place(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", stop)
            with pytest.raises((KeyboardInterrupt, ValueError)):
                tracking.connect()
        assert list(tmp_path.glob("mlflow*")) == []
        monkeypatch.setattr(
            tracking, "_make_database", lambda path, _: path.write_bytes(finished.read_bytes())
        )
        tracking.connect()
        with tracking.run("next"):
            pass
    assert (tmp_path / "mlflow.db").is_file()


def test_a_store_elsewhere_leaves_a_checkout_alone_that_nobody_may_write(
    tmp_path, tmp_path_factory
):
    (tmp_path / "file").touch()
    checkout = tmp_path / "file" / "checkout"  # nobody can make anything in it, not even root
    with place(checkout, new_store(tmp_path, tmp_path_factory), cwd=tmp_path):
        tracking.connect()
        with tracking.run("elsewhere") as active:
            tracking.log_network(network())
        assert status(active.info.run_id) == "FINISHED"
    assert {path.name for path in tmp_path.iterdir()} >= {"mlflow.db", "mlflow.db.running"}


def test_starts_at_the_same_time_make_one_store(tmp_path, tmp_path_factory, monkeypatch):
    def make(path, _):
        made.append(path)
        time.sleep(0.3)  # as if it were at work; the others look meanwhile
        path.write_bytes(finished.read_bytes())

    made, found = [], []
    finished = first_use(tmp_path_factory) / "root" / "mlflow.db"
    monkeypatch.setattr(tracking, "_make_database", make)
    with place(tmp_path):
        threads = [threading.Thread(target=lambda: found.append(tracking.connect())) for _ in "12"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1 and len(found) == 2 and len(set(found)) == 1


def test_what_a_start_that_was_killed_has_begun_goes_at_the_next(tmp_path, monkeypatch):
    half = tmp_path / "mlflow.db.running" / "half"
    half.mkdir(parents=True)
    (half / "mlflow.db").write_text("half a database")

    def make(uri, _):
        assert not Path(uri.removeprefix("sqlite:///")).exists()
        raise OSError

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", make)
    with place(tmp_path), pytest.raises(ValueError):
        tracking.connect()
    assert not half.exists() and not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
@pytest.mark.parametrize("default", [True, False])
def test_a_path_that_is_another_one_in_an_address_is_refused_at_once(tmp_path, name, default):
    folder = tmp_path / name
    folder.mkdir()
    uri = None if default else f"sqlite:///{folder.as_posix()}/mlflow.db"
    with place(folder, uri), pytest.raises(ValueError, match=r"can't hold the % or \?"):
        tracking.connect()
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_question_mark_in_the_name_of_the_file_is_refused_too(tmp_path):
    uri = f"sqlite:///{tmp_path.as_posix()}/what?.db"
    with place(tmp_path, uri), pytest.raises(ValueError, match=r"can't hold the % or \?"):
        tracking.connect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "rest"),
    [
        ("http://me:s3cret@127.0.0.1:9", "127.0.0.1:9"),
        ("http://me:a/s3cret@127.0.0.1:9", "127.0.0.1:9"),
        ("postgresql://me:s3cret@nowhere/x", "nowhere/x"),
        ("postgresql://me:a/s3cret@nowhere/x", "nowhere/x"),
        ("postgresql://nowhere/x?user=me&password=s3cret&port=1", "port=1"),
    ],
)
def test_no_sentence_tells_a_password(tmp_path, uri, rest):
    with place(tmp_path, uri), pytest.raises((ConnectionError, ValueError)) as error:
        tracking.connect()
    shown = "".join(traceback.format_exception(error.value))
    assert "s3cret" not in shown and rest in shown


@pytest.mark.parametrize("place", ["http://host:5000/a@b", "sqlite:////home/a@b/mlflow.db"])
def test_an_at_sign_in_a_path_is_no_password(place):
    assert tracking._shown(place) == place


def test_a_login_goes_to_its_own_server_only(server, tmp_path):
    with gate(server[0]) as first, gate(server[0]) as second, place(tmp_path):
        for uri in (first.uri.replace("http://", "http://me:secret@"), second.uri):
            os.environ["MLFLOW_TRACKING_URI"] = uri
            tracking.connect()
        assert len(first.logins) == 1 and second.logins <= {None, ""}
        os.environ["MLFLOW_TRACKING_USERNAME"] = "mine"  # set by the user, it stays
        tracking.connect()
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "mine"


def test_a_password_in_the_address_reaches_the_server_and_is_shown_nowhere(server, tmp_path, capfd):
    with gate(server[0]) as gate_:
        host = gate_.uri.removeprefix("http://")
        with place(tmp_path, f"http://me:s%20cret@{host}"):
            tracking.connect()
            with tracking.run("run") as active:
                shown = tracking.where_to_look(active)
            uri = mlflow.get_tracking_uri()
    login = base64.b64encode(b"me:s cret").decode()
    assert gate_.logins == {f"Basic {login}"}
    printed = "".join(capfd.readouterr())
    assert uri == f"http://{host}" and "cret" not in shown + printed


def sooner(seconds):
    """A deadline of at most a minute, over after half a second."""
    assert seconds <= 60
    return deadline(0.5)


def test_a_server_that_drips_is_given_up_after_the_time_for_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.alive, "deadline", sooner)
    before = signal.getsignal(signal.SIGALRM)
    with dripping() as uri, place(tmp_path, uri):
        with pytest.raises(ConnectionError, match="it took longer than"):
            tracking.connect()
        monkeypatch.setattr(tracking, "_check_answer", lambda uri: None)
        with pytest.raises(ValueError, match="it took longer than"):
            tracking.connect()
        with pytest.raises(tracking.NotRecorded, match="it took longer than"):
            with tracking.run("run"):
                pytest.fail("it began")
    assert signal.getsignal(signal.SIGALRM) == before and not any(signal.getitimer(0))


def test_the_experiment_that_the_user_has_set_is_used_and_stays_set(store, monkeypatch):
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)

    def name(run):
        return mlflow.get_experiment(run.info.experiment_id).name

    for chosen in (None, "by name", "by call"):
        if chosen == "by name":
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", chosen)
        elif chosen:
            mlflow.set_experiment(chosen)
        assert mlflow.get_experiment(tracking.connect()).name == (chosen or tracking.EXPERIMENT)
        with tracking.run("outer") as outer:
            with tracking.run("inner") as inner:
                tracking.set_stage("stage")
        assert {name(outer), name(inner)} == {chosen or tracking.EXPERIMENT}
        assert tracking.find_runs("stage", {}) == [inner.info.run_id]
        with mlflow.start_run() as own:
            assert name(own) == (chosen or "Default")


def test_the_experiment_in_the_environment_is_used_by_number_and_rather_by_name(store, monkeypatch):
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    number, other = (mlflow.create_experiment(name) for name in ("by number", "rather by name"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert tracking.connect() == number
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "rather by name")
    assert tracking.connect() == other


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_database_of_the_users_own_is_made_whole_or_not_at_all_too(tmp_path, monkeypatch, error):
    made = []

    def stop(path, files):
        made.append(path)
        raise error

    monkeypatch.setattr(tracking, "_make_database", stop)
    with place(tmp_path, f"sqlite:///{tmp_path.as_posix()}/own.db"):
        with pytest.raises((KeyboardInterrupt, ValueError)):
            tracking.connect()
    assert made == [tmp_path / "own.db"] and not made[0].exists()


# Where they can be seen


def test_the_page_with_the_runs_is_named_with_what_to_type(tmp_path_factory):
    folder = first_use(tmp_path_factory) / "root"
    with place(folder):
        experiment = tracking.connect()
        with tracking.run("default") as active:
            how, where = tracking.where_to_look(active).split("\n")
        mlflow.MlflowClient().delete_run(active.info.run_id)
    assert f"`uv run mlflow ui` in {folder} " in how
    assert f" http://127.0.0.1:5000/#/experiments/{experiment}/runs?" in how
    assert active.info.run_id in where and f"{folder.as_posix()}/mlflow.db" in where


def test_a_store_elsewhere_is_named_and_a_server_has_a_page_of_its_own(store, monkeypatch):
    with tracking.run("elsewhere") as active:
        page = f"/{tracking.page(active, curves=True)}"
        uri = "sqlite:////else where/mlflow.db"
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
        how, where = tracking.where_to_look(active).split("\n")
        assert f"`uv run mlflow ui --backend-store-uri '{uri}'` and" in how and uri in where
        assert how.endswith(f" http://127.0.0.1:5000{page}")

        uri = "https://runs.example/team/"
        how, where = tracking.where_to_look(active).split("\n")
        assert how.endswith(f" open https://runs.example/team{page}") and uri in where
        assert "uv run" not in how


def test_the_page_with_curves_asks_for_the_runs_under_one_parent(store):
    with tracking.run("parent") as parent, tracking.run("child") as child:
        pass
    for active in (parent, child):
        page, _, asked = tracking.page(active, curves=True).partition("?")
        assert page == tracking.page(active) == f"#/experiments/{child.info.experiment_id}/runs"
        (wanted,) = parse_qs(asked)["searchFilter"]
        found = mlflow.search_runs([child.info.experiment_id], wanted, output_format="list")
        assert [run.info.run_id for run in found] == [child.info.run_id]


# Runs


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_a_run_and_those_around_it_end_as_the_block_did(store, error, expected):
    ids = []
    try:
        with tracking.run("outer") as outer:
            with tracking.run("before") as before:
                pass
            with tracking.run("middle") as middle, tracking.run("inner") as inner:
                ids = [active.info.run_id for active in (outer, middle, inner)]
                assert [status(run_id) for run_id in ids] == ["RUNNING"] * 3
                if error:
                    raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert [status(run_id) for run_id in ids] == [expected] * 3
    assert status(before.info.run_id) == "FINISHED"
    assert mlflow.active_run() is None


def test_an_interrupt_that_is_caught_inside_leaves_the_outer_run_finished(store):
    with tracking.run("outer") as outer:
        with pytest.raises(KeyboardInterrupt), tracking.run("inner") as inner:
            raise KeyboardInterrupt
        assert mlflow.active_run().info.run_id == outer.info.run_id
    assert (status(outer.info.run_id), status(inner.info.run_id)) == ("FINISHED", "KILLED")


def test_runs_of_ones_own_inside_do_not_keep_a_run_from_ending_nor_end_another(store):
    with tracking.run("outer") as outer:
        with tracking.run("ours") as ours:
            mlflow.start_run(nested=True)
        assert status(ours.info.run_id) == "FINISHED"
        mlflow.end_run()
        mlflow.end_run()
        with tracking.run("ended", outer.info.run_id) as ended:
            mlflow.end_run()
        assert status(ended.info.run_id) == "FINISHED"
        assert status(outer.info.run_id) == "RUNNING"


def test_a_run_stands_under_the_active_run_or_under_the_one_named(store):
    with tracking.run("parent") as parent, tracking.run("child") as child:
        assert child.data.tags["mlflow.runName"] == "child"
    with tracking.run("later", parent.info.run_id) as later:
        pass
    for run_id in (child.info.run_id, later.info.run_id):
        tags = mlflow.get_run(run_id).data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tracking.parent_of(run_id) == parent.info.run_id
    assert tracking.parent_of(parent.info.run_id) is None


def test_a_repeated_stage_of_one_parent_gets_a_name_of_its_own(store):
    with tracking.run("parent") as parent:
        pass
    for expected in ("prune", "prune (2)", "prune (3)"):
        with tracking.run("prune", parent.info.run_id) as again:
            assert again.info.run_name == expected
    with tracking.run("another parent") as other, tracking.run("prune", other.info.run_id) as first:
        assert first.info.run_name == "prune"


def test_an_experiment_has_its_settings_as_its_name_and_as_parameters(store):
    settings = {"seed": 1, "updates": None, "channels": (8, 16)}
    with tracking.experiment(settings) as parent, tracking.run("train") as child:
        pass
    assert re.fullmatch(r"seed 1, channels 8-16, 20[-\d]+ [:\d]+", parent.info.run_name)
    data = mlflow.get_run(parent.info.run_id).data
    assert data.params == {name: str(value) for name, value in settings.items()}
    assert "below it the runs of its steps" in data.tags["mlflow.note.content"]
    assert tracking.parent_of(child.info.run_id) == parent.info.run_id


# How they end


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_as_an_interrupt_does(store, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        with tracking.run("outer") as outer, tracking.run("inner") as inner:
            os.kill(os.getpid(), number)
            time.sleep(10)
    assert [status(each.info.run_id) for each in (outer, inner)] == ["KILLED"] * 2
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_python_ignores_comes_again(store, name):
    class Object:
        pass

    def interrupted(_):
        os.kill(os.getpid(), getattr(signal, name))
        sum(range(10_000))

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), tracking.run("run") as active:
        thing = Object()
        reference = weakref.ref(thing, interrupted)
        del thing  # Python ignores what a weak reference's callback raises
        assert reference() is None
        for _ in range(1000):
            time.sleep(0.01)
    assert status(active.info.run_id) == "KILLED" and sys.unraisablehook is before


def test_other_errors_that_python_ignores_are_reported_as_before(store, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with tracking.run("run"):
        thing = threading.Event()
        reference = weakref.ref(thing, failing(ValueError("in a callback")))
        del thing
    assert reference() is None and [found.exc_type for found in ignored] == [ValueError]


def test_an_interrupt_while_a_run_starts_leaves_none_that_goes_on(store, monkeypatch):
    def interrupted(client, *args, **kwargs):
        made.append(create(client, *args, **kwargs).info.run_id)
        raise KeyboardInterrupt

    made, create = [], mlflow.MlflowClient.create_run
    monkeypatch.setattr(mlflow.MlflowClient, "create_run", interrupted)
    with pytest.raises(KeyboardInterrupt), tracking.run("run"):
        pytest.fail("it began")
    assert status(made[0]) == "KILLED"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_interrupt_doesnt_stop_the_marking_of_the_first(store, monkeypatch, name):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)
        return end(*args, **kwargs)

    end = mlflow.MlflowClient.set_terminated
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(KeyboardInterrupt) as caught:
        with tracking.run("outer") as outer, tracking.run("inner") as inner:
            monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", interrupted)
            raise KeyboardInterrupt
    assert [status(each.info.run_id) for each in (outer, inner)] == ["KILLED"] * 2
    assert ["marked as KILLED" in note for note in caught.value.__notes__] == [True] * 2
    assert signal.getsignal(getattr(signal, name)) == before


def test_an_interrupt_behind_the_end_leaves_the_run_finished(store, monkeypatch):
    def interrupted(*_):
        end()
        raise KeyboardInterrupt

    end = mlflow.end_run
    with pytest.raises(KeyboardInterrupt), tracking.run("run") as active:
        monkeypatch.setattr(mlflow, "end_run", interrupted)
    assert status(active.info.run_id) == "FINISHED"


def test_a_signal_that_is_ignored_stays_ignored(store):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with tracking.run("run") as active:
            os.kill(os.getpid(), signal.SIGHUP)
        assert status(active.info.run_id) == "FINISHED"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_the_signals_alone(store):
    def work():
        with tracking.run("thread") as active:
            ended.append(active.info.run_id)

    ended = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert status(ended[0]) == "FINISHED"


def test_the_next_start_marks_the_runs_of_the_dead_and_no_others(store, shared, processes):
    # Of a run without a lock here, on another machine perhaps, nothing is known.
    elsewhere = mlflow.MlflowClient().create_run(tracking.connect()).info.run_id
    ours, theirs = processes.Pipe()
    process = processes.Process(target=wait_in_a_run, args=(*shared, theirs))
    try:
        with tracking.run("mine") as mine:
            process.start()
            its_runs = ours.recv()  # it has connected meanwhile
            tracking.connect()
            assert {status(each) for each in its_runs} == {"RUNNING"}
            process.kill()
            process.join()
            assert {status(each) for each in its_runs} == {"RUNNING"}
            tracking.connect()
            assert {status(each) for each in its_runs} == {"KILLED"}
            for each in its_runs:  # what lay on this machine
                assert_equal_networks(tracking.load_network(each), network())
            assert status(mine.info.run_id) == status(elsewhere) == "RUNNING"
    finally:
        process.kill()
        process.join()
    assert {path.name for path in shared[0].glob("mlflow.db.running/*")} <= {"all.lock"}


def test_a_run_that_ended_before_its_process_died_stays_as_it_ended(store, shared):
    with tracking.run("finished") as finished:
        pass
    left = shared[0] / "mlflow.db.running" / f"{finished.data.tags[tracking.LOCK]}.alive"
    left.touch()
    half = left.with_suffix("") / "tmp" / "half"
    half.mkdir(parents=True)
    tracking.connect()
    assert status(finished.info.run_id) == "FINISHED" and not left.exists()
    assert not half.parent.parent.exists()


@pytest.mark.parametrize("lock", ["{}.gone", "999999.gone"])
def test_a_lock_of_a_run_that_is_no_more_is_forgotten(store, shared, lock):
    with tracking.run("alive") as active:
        name = lock.format(active.info.experiment_id)
        left = shared[0] / "mlflow.db.running" / f"{name}.alive"
        left.touch()
        tracking.connect()
        assert not left.exists()
        assert status(active.info.run_id) == "RUNNING"


def test_options_in_an_address_are_no_part_of_the_place(shared):
    folder, uri = shared
    with place(folder, f"{uri}?timeout=20"):
        tracking.connect()
        with tracking.run("options") as active:
            assert len(list((folder / "mlflow.db.running").glob("*.alive"))) == 1
        assert status(active.info.run_id) == "FINISHED"
    assert not [path.name for path in folder.iterdir() if "?" in path.name]


def test_what_belongs_to_a_server_lies_in_the_users_home_and_tells_no_password(tmp_path):
    with place(tmp_path):
        mlflow.set_tracking_uri("https://me:secret@runs.example:80/team")
        folder = tracking._folder_of_this_machine()
    assert tmp_path in folder.parents
    assert "runs.example" in folder.name and "secret" not in str(folder)


@pytest.mark.parametrize("trouble", ["unknown user", "read-only home"])
def test_without_a_home_it_lies_among_the_temporary_files(tmp_path, monkeypatch, trouble):
    def access(path, mode):
        return path != tmp_path

    with place(tmp_path):
        if trouble == "unknown user":
            monkeypatch.delenv("HOME")
            monkeypatch.setattr("pwd.getpwuid", failing(KeyError("uid not found")))
            assert tracking.mlflow.get_tracking_uri()
        else:
            monkeypatch.setattr(os, "access", access)
        mlflow.set_tracking_uri("https://runs.example")
        folder = tracking._folder_of_this_machine()
    assert Path(tempfile.gettempdir()) in folder.parents and tmp_path not in folder.parents


# Networks


@pytest.mark.parametrize("channels", [(1,), (2, 3)])
def test_a_network_that_was_logged_is_read_with_equal_logits(store, channels):
    model = network(channels)
    with tracking.run("network") as active:
        tracking.log_network(model)
    random = torch.get_rng_state()
    loaded = tracking.load_network(active.info.run_id)
    assert_same(torch.get_rng_state(), random)
    assert loaded.channels == channels
    assert_same(logits(loaded), logits(model))
    assert artifacts(active.info.run_id) == ["network.pt", "summary.txt"]


def test_the_file_of_a_network_holds_tensors_and_numbers_only(store):
    model = network()
    with tracking.run("network") as active:
        tracking.log_network(model)
    path = mlflow.artifacts.download_artifacts(f"runs:/{active.info.run_id}/network.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["channels"] == (2, 3)
    assert_same(dict(saved["state_dict"]), dict(model.state_dict()))


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda what, to: to.write_bytes(pickle.dumps(what))])
def test_a_pickle_in_place_of_a_network_is_refused_and_never_run(store, shared, tmp_path, write):
    with tracking.run("network") as active:
        tracking.log_network(network())
    (path,) = shared[0].rglob(f"{active.info.run_id}/**/network.pt")
    write({"channels": (2, 3), "state_dict": Attack(tmp_path / "attacked")}, path)
    with pytest.raises(ValueError, match="does not hold a network"):
        tracking.read_network(path)
    # And if somebody changed the digest as well:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not the one that was logged"):
        tracking.load_network(active.info.run_id)
    mlflow.MlflowClient().set_tag(active.info.run_id, tracking.DIGEST, digest)
    with pytest.raises(ValueError, match="does not hold a network"):
        tracking.load_network(active.info.run_id)
    assert not (tmp_path / "attacked").exists()


def test_a_network_of_ones_own_is_logged_and_read_into_a_new_one(store):
    def own(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))

    with tracking.run("own") as active:
        fit_and_log(own(0), *map(Pairs, SPLITS), epochs=1, batch_size=20, lr=1e-30, seed=0)
    new = own(1)
    assert tracking.load_network(active.info.run_id, new) is new
    assert_same(logits(new), logits(own(0)))
    found = mlflow.get_run(active.info.run_id).data
    assert found.params["channels"] == "(2,)" and found.metrics["filters"] == 2
    with pytest.raises(ValueError, match="does not hold a network"):
        tracking.load_network(active.info.run_id)


@pytest.mark.parametrize("does", ["log", "load"])
def test_a_large_network_has_the_time_that_100_kilobytes_a_second_take(store, monkeypatch, does):
    large, given = network((40, 60)), []
    with tracking.run("large") as active:
        tracking.log_network(large)
        monkeypatch.setattr(tracking.alive, "deadline", lambda s: given.append(s) or deadline(s))
        if does == "log":
            tracking.log_network(large)
    if does == "load":
        tracking.load_network(active.info.run_id, large)
    size = 4 * sum(parameter.numel() for parameter in large.parameters())
    assert max(given) == pytest.approx(60 + size / 1e5) and size > 1e6


def test_a_file_that_tells_of_a_huge_network_is_refused_without_building_it(tmp_path):
    for channels in ((300_000,), (2**40, 3)):
        file = {"channels": channels, "state_dict": network().state_dict()}
        torch.save(file, tmp_path / "network.pt")
        with pytest.raises(ValueError, match="does not hold a network"):
            tracking.read_network(tmp_path / "network.pt")


@pytest.mark.parametrize("write", [torch.save, lambda what, to: to.write_bytes(pickle.dumps(what))])
@pytest.mark.parametrize("new_digest", [False, True])
def test_code_in_place_of_a_model_is_refused_and_never_run(store, tmp_path, write, new_digest):
    with tracking.run("model") as active:
        tracking.log_model(network(), IMAGES[:2])
    run_id = active.info.run_id
    (model,) = mlflow.get_run(run_id).outputs.model_outputs
    location = mlflow.get_logged_model(model.model_id).artifact_location
    folder = Path(urlsplit(location).path if ":" in location else location)
    settings = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(settings.replace("mlflow.pytorch", "antigravity"))
    assert "antigravity" in (folder / "MLmodel").read_text()
    assert_same(tracking.predict(run_id, IMAGES), logits(network()).argmax(1))
    assert "antigravity" not in sys.modules
    path = folder / "data" / "model.pt2"
    write(Attack(tmp_path / "attacked"), path)
    if new_digest:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        mlflow.MlflowClient().set_tag(run_id, tracking.MODEL_DIGEST, digest)
    with pytest.raises((ValueError, mlflow.MlflowException)):
        tracking.predict(run_id, IMAGES)
    assert not (tmp_path / "attacked").exists()


def test_a_run_without_a_network_is_an_error(store):
    with tracking.run("empty") as active:
        pass
    for run_id in (active.info.run_id, "0" * 32):
        with pytest.raises(mlflow.MlflowException):
            tracking.load_network(run_id)
    with pytest.raises(mlflow.MlflowException):
        tracking.predict(active.info.run_id, IMAGES)


def test_a_logged_model_gives_any_number_of_images_the_networks_labels(store):
    model = network().train().to(memory_format=torch.channels_last)
    model.network[0].requires_grad_(False)
    images = IMAGES[:2].clone()
    with tracking.run("model") as active:
        before = state_of(model, images)
        tracking.log_model(model, images)
        after = state_of(model, images)
    for part in before.keys() - {"random"}:  # MLflow draws
        assert_same(after[part], before[part])
    for count in (1, 2, 30):
        labels = tracking.predict(active.info.run_id, IMAGES[:count])
        assert labels.dtype == torch.int64
        assert_same(labels, logits(model)[:count].argmax(1))


def test_a_network_is_kept_whole_or_not_at_all(store, monkeypatch):
    def full(_, file):
        file.write(b"half a network")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(tracking.NotRecorded, match="No space left") as error:
        with tracking.run("full"):
            path = tracking.keep_network(network())
            monkeypatch.setattr(torch, "save", full)
            tracking.keep_network(network(seed=1))
    assert str(path) in str(error.value)
    assert_equal_networks(tracking.read_network(path), network())
    assert list(path.parent.iterdir()) == [path]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [None, ValueError("mine"), OSError(errno.ENOSPC, "mine"), KeyboardInterrupt()],
    ids=repr,
)
def test_whatever_the_users_block_raises_comes_through_and_mlflow_gets_the_network(store, error):
    with pytest.raises(type(error)) if error else nullcontext() as caught:
        with tracking.run("run") as active:
            path = tracking.keep_network(network())
            assert path.exists()
            if error:
                raise error
    assert error is None or caught.value is error
    assert not path.parent.exists()
    assert_equal_networks(tracking.load_network(active.info.run_id), network())


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        KeyError("run"),
        TypeError("a proxy's answer"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["log_artifact", "log_text", "set_tag"])
def test_whatever_mlflow_raises_is_one_sentence_that_says_where_the_network_lies(
    store, monkeypatch, error, place
):
    with monkeypatch.context() as patch, pytest.raises(tracking.NotRecorded) as caught:
        with tracking.run("run") as active:
            path = tracking.keep_network(network())
            patch.setattr(mlflow.MlflowClient, place, failing(error))
            tracking.log_network(network())
    said = str(caught.value)
    assert "'run'" in said and error.args[-1] in said and str(path) in said and "\n" not in said
    assert_equal_networks(tracking.read_network(path), network())
    assert status(active.info.run_id) == "FAILED"
    tracking.connect()  # gives it to MLflow
    assert not path.exists()
    assert_equal_networks(tracking.load_network(active.info.run_id), network())


def test_a_network_that_mlflow_never_gets_is_never_deleted_and_is_named(store, monkeypatch):
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", failing(PermissionError("no")))
    with pytest.raises(ValueError) as caught, tracking.run("run"):
        path = tracking.keep_network(network())
        raise ValueError
    assert str(path) in "".join(caught.value.__notes__)
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        tracking.connect()
    assert_equal_networks(tracking.read_network(path), network())


def test_logging_without_a_run_is_an_error(store):
    with pytest.raises(ValueError, match="No run is active"):
        tracking.log_metrics({"value": 1})
    assert mlflow.active_run() is None


# A server


def test_everything_is_tracked_on_a_server_too(server, tmp_path):
    uri, folder = server
    with place(tmp_path, uri):
        settings = SETTINGS | {"epochs": 2}
        model, trained = baseline(*SPLITS, (2, 3), **settings)
        read, same = baseline(*SPLITS, (2, 3), **settings)
        assert same == trained
        assert_equal_networks(read, model)
        parent = tracking.parent_of(trained)
        with tracking.run("prune", parent) as prune:
            pruner = TaylorPruner(model)
            pruner.score(SPLITS[0])
            removed = pruner.select(2)
            small = pruner.prune(2)
            tracking.log_dict(removed, "removed.json")
            tracking.log_network(small)
        with tracking.run("fine-tune", parent) as tune:
            fit_and_log(small, *SPLITS, seed=0, **SETTINGS)
            tracking.log_model(small, IMAGES[:2])
        assert_same(tracking.predict(tune.info.run_id, IMAGES), logits(small).argmax(1))
        assert tracking.load_network(prune.info.run_id).channels == small.channels
        assert mlflow.artifacts.load_dict(f"runs:/{prune.info.run_id}/removed.json") == removed

        found = {named(run): run for run in runs(uri)}
        assert list(found) == ["parent", "train", "prune", "fine-tune"]
        assert {run.info.status for run in found.values()} == {"FINISHED"}
        for name, run in found.items():
            under = None if name == "parent" else parent
            assert run.data.tags.get("mlflow.parentRunId") == under
        assert found["train"].data.params["epochs"] == "2"
        assert found["fine-tune"].data.params["channels"] == str(small.channels)
        for name in ("train", "fine-tune"):
            assert {"train_loss", "val_accuracy", "test_accuracy"} <= set(found[name].data.metrics)
            steps = mlflow.MlflowClient(uri).get_metric_history(
                found[name].info.run_id, "train_loss"
            )
            assert [m.step for m in steps] == ([1, 2] if name == "train" else [1])
        assert artifacts(trained, uri) == ["network.pt", "summary.txt", "training.png"]
        assert "removed.json" in artifacts(prune.info.run_id, uri)
        (tracked,) = found["fine-tune"].outputs.model_outputs
        assert mlflow.MlflowClient(uri).get_logged_model(tracked.model_id).name == "model"
    assert not (tmp_path / "mlruns").exists() and not (tmp_path / "mlflow.db").exists()
    assert list((folder / "served").rglob("network.pt"))


# A server in trouble


def impatient(monkeypatch, retries=0):
    settings = tracking.PATIENCE | {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
    }
    monkeypatch.setattr(tracking, "PATIENCE", settings)


def kept_networks(home):
    return list(home.rglob(".cnn-pruning/**/network.pt"))


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refused", "Connection refused"),
        ("silent", "timed out"),
        ((500, b"a fault"), "500"),
        ((403, b"<html>Not for you</html>"), "403"),
        ((200, b"<html>Please log in</html>"), "not in a valid JSON format"),
        ((200, b'{"unexpected": true}'), ""),
    ],
)
def test_of_a_server_in_trouble_one_sentence_says_what_is_lost_and_where_the_network_is(
    server, tmp_path, monkeypatch, trouble, reason
):
    def begin(row):
        gate_.trouble = trouble
        if trouble == "refused":
            gate_.shutdown()
            gate_.socket.close()

    impatient(monkeypatch)
    no_figures(monkeypatch)
    settings = SETTINGS | {"epochs": 2}
    with gate(server[0]) as gate_, place(tmp_path, gate_.uri):
        tracking.connect()
        with pytest.raises(tracking.NotRecorded) as error:
            with tracking.run("outer"), tracking.run("train"):
                fit_and_log(network(), *SPLITS, on_epoch=begin, **settings)
        assert mlflow.active_run() is None
        (path,) = kept_networks(tmp_path)
        said = str(error.value)
        assert "'train'" in said and gate_.uri in said and reason in said and str(path) in said
        assert said.count("\n") == 0 and len(said) < 600
        expected = network()
        fit(expected, *SPLITS[:2], **settings)  # both epochs were trained
        assert_equal_networks(tracking.read_network(path), expected)


def test_a_server_that_comes_back_gets_everything_and_is_told_of_runs_it_missed(
    server, tmp_path, monkeypatch
):
    impatient(monkeypatch, retries=3)
    with gate(server[0]) as gate_, place(tmp_path, gate_.uri):
        tracking.connect()
        with tracking.run("patient") as active:
            gate_.trouble = (503, b"")
            threading.Timer(0.2, setattr, (gate_, "trouble", None)).start()
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
            tracking.log_metrics({"value": 1})
            tracking.log_network(network())
        assert gate_.asked and tracking.metric(active.info.run_id, "value") == 1
        assert status(active.info.run_id) == "FINISHED" and kept_networks(tmp_path) == []

        with pytest.raises(ValueError), tracking.run("cut off") as cut:
            gate_.trouble = (503, b"")
            raise ValueError
        gate_.trouble = None
        assert status(cut.info.run_id) == "RUNNING"
        tracking.connect()
        assert status(cut.info.run_id) == "KILLED"


def test_an_interrupt_ends_the_waiting_for_a_server_at_once(server, tmp_path):
    with gate(server[0]) as gate_, place(tmp_path, gate_.uri):
        tracking.connect()
        with pytest.raises(KeyboardInterrupt) as error:
            with tracking.run("outer"), tracking.run("train"):
                tracking.keep_network(network())
                gate_.trouble = (503, b"")
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                tracking.log_metrics({"value": 1})
        assert gate_.asked <= 4  # twice at once for the value, and once for the end of each run
        (path,) = kept_networks(tmp_path)
        assert any(str(path) in note for note in error.value.__notes__)
        assert_equal_networks(tracking.read_network(path), network())


def test_a_server_has_more_than_twenty_seconds_to_come_back_and_less_than_a_minute_in_all():
    tries, factor, each = (
        int(tracking.PATIENCE[f"MLFLOW_HTTP_REQUEST_{name}"])
        for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "TIMEOUT")
    )
    waits = sum(factor * 2**number for number in range(1, tries))  # urllib3 starts with none
    ends = 2 * int(tracking.ONE_TRY["MLFLOW_HTTP_REQUEST_TIMEOUT"])  # of a run and its parent
    assert 20 < waits < waits + tries + (1 + tries) * each + ends < 60  # a second's jitter a try


def test_the_users_patience_wins(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "6")
    tracking.connect()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "6"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
