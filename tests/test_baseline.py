import mlflow
import pytest
import torch
from stores import (
    SETTINGS,
    SPLITS,
    assert_equal_networks,
    dataset,
    network,
    runs,
    status,
)

from cnn_pruning import baseline as baselines
from cnn_pruning import evaluate, tracking

# Training that is logged


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
    sizes = {"filters", "parameters"}
    assert set(found.data.metrics) == {"train_loss", "val_loss", "val_accuracy", *expected, *sizes}

    inputs = {i.tags[0].value: i.dataset.name for i in found.inputs.dataset_inputs}
    assert inputs == {name: name for name in ("train", "validation", "test")}
    assert "Conv2d" in mlflow.artifacts.load_text(f"runs:/{run_id}/summary.txt")
    assert_equal_networks(tracking.load_network(run_id), model)


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


def test_other_training_data_are_another_baseline(store):
    _, run_id = baseline(seed=20)
    other = dataset(60, seed=9)
    _, another = baselines.baseline(other, *SPLITS[1:], (2, 3), 20, **SETTINGS)
    assert another != run_id
    assert baseline(seed=20)[1] == run_id


def test_a_training_that_is_not_marked_is_no_baseline(store):
    with tracking.run("fine-tune") as active:
        baselines.fit_and_log(network(), *SPLITS, seed=25, **SETTINGS)
    assert baseline(seed=25)[1] != active.info.run_id


def test_a_marked_training_that_failed_is_no_baseline(store):
    with pytest.raises(ValueError), tracking.run("train") as active:
        baselines.fit_and_log(network(), *SPLITS, seed=26, **SETTINGS)
        tracking.set_stage("baseline")
        raise ValueError
    assert baseline(seed=26)[1] != active.info.run_id


def test_the_newest_of_equal_baselines_is_taken(store, no_training):
    _, first = baseline(seed=27)
    with tracking.run("train") as active:
        baselines.fit_and_log(network(seed=27), *SPLITS, seed=27, **SETTINGS)
        tracking.set_stage("baseline")
    no_training()
    assert baseline(seed=27)[1] == active.info.run_id != first


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0}, {"seed": "x"}, {"batch_size": 0}])
def test_settings_that_cannot_be_used_are_an_error_before_there_is_a_run(store, wrong):
    before = len(runs())
    with pytest.raises(ValueError, match=next(iter(wrong))):
        baseline(**wrong)
    assert len(runs()) == before


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
