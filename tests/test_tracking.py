import socket
import threading
from contextlib import contextmanager

import mlflow
import pytest
import torch
from networks import assert_same
from stores import (
    artifacts,
    dataset,
    first_use,
    new_store,
    no_figures,
    no_server,
    place,
    runs,
    silent_server,
)

from cnn_pruning import CNN, TaylorPruner, evaluate, tracking
from cnn_pruning import baseline as baselines

SETTINGS = {"epochs": 1, "batch_size": 20, "lr": 1e-3}


SPLITS = dataset(60), dataset(30, seed=1), dataset(30, seed=2)
IMAGES = SPLITS[2].tensors[0]


def assert_equal_networks(left, right):
    assert_same(dict(left.state_dict()), dict(right.state_dict()))
    # Training lays the weights out in another order, so the sums are rounded otherwise: float32.
    torch.testing.assert_close(logits(left), logits(right), rtol=1e-4, atol=1e-6)


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def network(channels=(2, 3), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CNN(channels)


def status(run_id):
    return mlflow.get_run(run_id).info.status


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return folder, new_store(folder, tmp_path_factory)


@pytest.fixture
def store(shared, monkeypatch):
    """A store that the tests share, so each looks at its own runs only."""
    folder, uri = shared
    no_figures(monkeypatch)
    with place(folder, uri):
        tracking.connect()
        yield


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


# Networks


@pytest.mark.parametrize("channels", [(1,), (2, 3)])
def test_a_network_that_was_logged_is_read_with_equal_logits(store, channels):
    model = network(channels)
    with tracking.run("network") as active:
        tracking.log_network(model)
    loaded = tracking.load_network(active.info.run_id)
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


def test_a_run_without_a_network_is_an_error(store):
    with tracking.run("empty") as active:
        pass
    for run_id in (active.info.run_id, "0" * 32):
        with pytest.raises(mlflow.MlflowException):
            tracking.load_network(run_id)
    with pytest.raises(mlflow.MlflowException):
        tracking.predict(active.info.run_id, IMAGES)


def test_training_logs_its_settings_its_epochs_and_its_result(store):
    model, seen = network(), []
    settings = SETTINGS | {"epochs": 3, "seed": 7}
    with tracking.run("train") as active:
        history = baselines.fit_and_log(model, *SPLITS, on_epoch=seen.append, **settings)
    run_id = active.info.run_id
    found = mlflow.get_run(run_id)
    assert found.data.params == {
        "channels": "(2, 3)",
        "epochs": "3",
        "batch_size": "20",
        "lr": "0.001",
        "seed": "7",
    }
    assert history == seen and [row["epoch"] for row in history] == [1, 2, 3]

    client = mlflow.MlflowClient()
    for name in ("train_loss", "val_loss", "val_accuracy"):
        logged = [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        assert logged == [(row["epoch"], row[name]) for row in history]
    test_loss, test_accuracy = evaluate(model, SPLITS[2])
    expected = {"test_loss": test_loss, "test_accuracy": test_accuracy}
    for name, value in expected.items():
        assert [m.value for m in client.get_metric_history(run_id, name)] == [value]
    assert set(found.data.metrics) == {"train_loss", "val_loss", "val_accuracy", *expected}

    inputs = {i.tags[0].value: i.dataset.name for i in found.inputs.dataset_inputs}
    assert inputs == {name: name for name in ("train", "validation", "test")}
    assert "Conv2d" in mlflow.artifacts.load_text(f"runs:/{run_id}/summary.txt")
    assert_equal_networks(tracking.load_network(run_id), model)


def test_a_logged_model_gives_any_number_of_images_the_networks_labels(store):
    model = network()
    with tracking.run("model") as active:
        tracking.log_model(model, IMAGES[:2])
    for count in (1, 2, 30):
        labels = tracking.predict(active.info.run_id, IMAGES[:count])
        assert labels.dtype == torch.int64
        assert_same(labels, logits(model)[:count].argmax(1))


# The baseline


def baseline(channels=(2, 3), seed=0, **settings):
    return baselines.baseline(*SPLITS, channels, seed, **{**SETTINGS, **settings})


@pytest.fixture
def no_training(monkeypatch):
    def train():
        monkeypatch.setattr(baselines, "fit", lambda *_, **__: pytest.fail("it was trained again"))

    return train


def test_the_baseline_is_trained_once_and_then_read(store, no_training):
    model, run_id = baseline(seed=10)
    before = len(runs())
    no_training()
    again, same = baseline(seed=10)
    assert same == run_id
    assert len(runs()) == before
    assert_equal_networks(again, model)
    found = mlflow.get_run(run_id)
    assert found.info.status == status(tracking.parent_of(run_id)) == "FINISHED"
    assert found.data.params["seed"] == "10"


@pytest.mark.parametrize(
    "other",
    [{"seed": 21}, {"lr": 2e-3}, {"epochs": 2}, {"batch_size": 30}, {"channels": (3, 2)}],
)
def test_other_settings_are_another_baseline(store, other):
    _, run_id = baseline(**{"seed": 20, **other})
    _, plain = baseline(seed=20)
    assert plain != run_id
    assert baseline(**{"seed": 20, **other})[1] == run_id


def test_settings_that_are_left_out_are_those_of_training(store):
    # By default there are 5 epochs.
    _, one_epoch = baseline(seed=30)
    shorter = {name: value for name, value in SETTINGS.items() if name != "epochs"}
    _, default = baselines.baseline(*SPLITS, (2, 3), 30, **shorter)
    assert default != one_epoch


def test_the_same_seed_trains_the_same_baseline(store):
    model, run_id = baseline(seed=40)
    mlflow.MlflowClient().delete_run(run_id)
    torch.manual_seed(99)  # the caller's random numbers play no part
    again, other = baseline(seed=40)
    assert other != run_id
    assert_equal_networks(again, model)


@pytest.mark.parametrize("damage", ["deleted", "cut short", "not a network"])
def test_a_baseline_whose_network_cannot_be_read_is_trained_again(store, shared, damage):
    model, run_id = baseline(seed=50)
    (path,) = shared[0].rglob(f"{run_id}/**/network.pt")
    if damage == "deleted":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.write_text("not a network")
    again, other = baseline(seed=50)
    assert other != run_id
    assert_equal_networks(again, model)
    mlflow.MlflowClient().delete_run(other)
    mlflow.MlflowClient().delete_run(run_id)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_baseline_that_did_not_finish_is_not_used(store, monkeypatch, error):
    def stop(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "evaluate", stop)
        with pytest.raises(error):
            baseline(seed=60)
    unfinished = {found.info.run_id for found in runs() if found.info.status != "FINISHED"}
    _, run_id = baseline(seed=60)
    assert run_id not in unfinished
    mlflow.MlflowClient().delete_run(run_id)


# A server


def test_everything_is_tracked_on_a_server_too(server, tmp_path):
    uri, folder = server
    with place(tmp_path, uri):
        model, trained = baseline(epochs=2)
        read, same = baseline(epochs=2)
        assert same == trained
        assert_equal_networks(read, model)
        parent = tracking.parent_of(trained)
        with tracking.run("prune", parent) as prune:
            pruner = TaylorPruner(model)
            pruner.score(SPLITS[0])
            removed = pruner.select(2)
            small = pruner.prune(2)
            mlflow.log_dict(removed, "removed.json")
            tracking.log_network(small)
        with tracking.run("fine-tune", parent) as tune:
            baselines.fit_and_log(small, *SPLITS, seed=0, **SETTINGS)
            tracking.log_model(small, IMAGES[:2])
        assert_same(tracking.predict(tune.info.run_id, IMAGES), logits(small).argmax(1))
        assert tracking.load_network(prune.info.run_id).channels == small.channels
        assert mlflow.artifacts.load_dict(f"runs:/{prune.info.run_id}/removed.json") == removed

        found = {run.data.tags["mlflow.runName"]: run for run in runs(uri)}
        assert list(found) == ["cnn-pruning", "train", "prune", "fine-tune"]
        assert {run.info.status for run in found.values()} == {"FINISHED"}
        for name, run in found.items():
            under = None if name == "cnn-pruning" else parent
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
