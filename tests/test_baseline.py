import copy
import math

import mlflow
import pytest
import torch
from stores import (
    SETTINGS,
    SPLITS,
    assert_equal_networks,
    dataset,
    network,
    no_figures,
    place,
    runs,
    status,
)
from torch.utils.data import TensorDataset

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


@pytest.mark.parametrize("split", [0, 2], ids=["training", "test"])
def test_other_training_or_test_data_are_another_baseline(store, split):
    _, run_id = baseline(seed=20)
    splits = list(SPLITS)
    splits[split] = dataset(len(SPLITS[split]), seed=9)
    _, another = baselines.baseline(*splits, (2, 3), 20, **SETTINGS)
    assert another != run_id
    assert baseline(seed=20)[1] == run_id


def test_a_run_without_its_accuracy_is_no_baseline(store):
    settings = SETTINGS | {"seed": 28}
    with tracking.run("train") as active:
        model = network()
        tracking.log_settings({"channels": tracking.widths(model), **settings})
        for name, data in (("train", SPLITS[0]), ("test", SPLITS[2])):
            tracking.log_data(data, name)
        tracking.log_network(model)
        tracking.set_stage("baseline")
    run_id = active.info.run_id
    assert tracking.find_runs("baseline", settings, SPLITS[0], SPLITS[2]) == [run_id]
    assert math.isnan(tracking.metric(run_id, "test_accuracy"))
    with pytest.warns(UserWarning, match=f"stored in run {run_id} is not used: .*nan% was logged"):
        assert baseline(seed=28)[1] != run_id


@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize("wrong", ["none", "no labels"])
def test_splits_that_cannot_be_used_are_an_error_before_the_store_is_opened(
    monkeypatch, split, wrong
):
    monkeypatch.setattr(tracking, "connect", lambda: pytest.fail("the store was opened"))
    splits = list(SPLITS)
    splits[split] = dataset(0) if wrong == "none" else TensorDataset(SPLITS[0].tensors[0])
    with pytest.raises((ValueError, TypeError), match=r"is empty|must be \(image, label\)"):
        baselines.baseline(*splits, (2, 3), 20, **SETTINGS)


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


def resave(change):
    """Damage to the file of a network: what ``change`` makes of its weights, saved as before."""

    def damage(path):
        saved = torch.load(path, weights_only=True)
        for tensor in saved["state_dict"].values():
            change(tensor)
        torch.save(saved, path)

    return damage


def one_bit(path):
    content = bytearray(path.read_bytes())
    saved = torch.load(path, weights_only=True)
    weights = saved["state_dict"]["network.5.weight"].numpy().tobytes()
    content[content.index(weights) + 3] ^= 1  # in the exponent of the first weight
    path.write_bytes(content)


def of_other_widths(path):
    other = network((3, 2))
    torch.save({"channels": other.channels, "state_dict": other.state_dict()}, path)


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "not a network": lambda path: path.write_text("not a network"),
    "NaN": resave(lambda tensor: tensor.fill_(float("nan"))),
    "zeros": resave(lambda tensor: tensor.zero_()),
    "one flipped bit": one_bit,
    "other widths": of_other_widths,
    "a pickle": lambda path: torch.save(network(), path),
}


@pytest.fixture(scope="module")
def trained(shared):
    """A baseline, the file of its network, and what stands in that file."""
    with place(*shared), pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        model, run_id = baseline(seed=50)
    (path,) = shared[0].rglob(f"{run_id}/**/network.pt")
    return model, run_id, path, path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_network_is_not_taken_for_the_baseline_which_is_trained_again(
    store, trained, damage
):
    model, run_id, path, content = trained
    damage(path)
    try:
        with pytest.warns(UserWarning, match=f"stored in run {run_id} is not used"):
            again, other = baseline(seed=50)
    finally:
        path.write_bytes(content)
    assert other != run_id
    assert_equal_networks(again, model)
    mlflow.MlflowClient().delete_run(other)


@pytest.mark.parametrize("wrong", ["weights", "widths", "NaN"])
def test_a_network_that_was_logged_in_place_of_the_trained_one_is_not_taken(store, trained, wrong):
    # Its digest is right then; its channels or its accuracy are not.
    model, run_id, path, content = trained
    other = network((3, 2) if wrong == "widths" else (2, 3))
    for parameter in other.parameters() if wrong != "widths" else ():
        parameter.data.fill_(float("nan") if wrong == "NaN" else 0)
    digest = mlflow.get_run(run_id).data.tags[tracking.DIGEST]
    with tracking.run("exchange") as active:
        tracking.log_network(other)
    client = mlflow.MlflowClient()
    exchanged = mlflow.get_run(active.info.run_id).data.tags[tracking.DIGEST]
    (file,) = path.parents[2].rglob(f"{active.info.run_id}/**/network.pt")
    path.write_bytes(file.read_bytes())
    client.set_tag(run_id, tracking.DIGEST, exchanged)
    try:
        assert_equal_networks(tracking.load_network(run_id), other)
        with pytest.warns(
            UserWarning, match="filters, not" if wrong == "widths" else "accuracy is"
        ):
            again, new = baseline(seed=50)
    finally:
        path.write_bytes(content)
        client.set_tag(run_id, tracking.DIGEST, digest)
    assert new != run_id
    assert_equal_networks(again, model)
    client.delete_run(new)


def test_its_first_weights_are_those_of_its_seed(store, monkeypatch):
    def keep(model, *_, **__):
        started.append(copy.deepcopy(model))
        return []

    started = []
    monkeypatch.setattr(baselines, "fit", keep)
    monkeypatch.setattr(baselines, "evaluate", lambda *_: (1.0, 0.5))
    monkeypatch.setattr("cnn_pruning.plots.curves", lambda *_: None)
    for caller, seed in (1, 70), (2, 71):
        torch.manual_seed(caller)
        baseline(seed=seed)
        assert_equal_networks(started[-1], network(seed=seed))


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
