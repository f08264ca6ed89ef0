import errno
import io
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path

import mlflow
import pytest
import torch
from stores import artifacts, dataset, named, no_figures, no_server, place, runs

import cnn_pruning.__main__ as program
from cnn_pruning import baseline, tracking
from cnn_pruning.experiments.data import FashionMNIST

SPLITS = dataset(200), dataset(50, seed=1), dataset(40, seed=2)
SMALL = {
    "--channels": "2 3",
    "--remove": "2",
    "--epochs": "2",
    "--fine-tune-epochs": "1",
    "--batch-size": "50",
    "--lr": "0.001",
    "--seed": "3",
}


def arguments(**changed):
    options = SMALL | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return [part for name, value in options.items() for part in (name, *value.split(" "))]


def status(argv):
    """The exit status of the program."""
    try:
        return program.main(argv)
    except SystemExit as stop:
        return stop.code


def by_name(found):
    return {named(run): run for run in found}


@pytest.fixture(scope="module")
def finished(shared):
    """What one run of the program printed, and its MLflow runs by name."""
    with place(*shared), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "fashion_mnist", lambda root: SPLITS)
        with redirect_stdout(io.StringIO()) as printed:
            assert program.main(arguments()) == 0
        return printed.getvalue(), by_name(runs())


@pytest.fixture
def store(shared, monkeypatch):
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    no_figures(monkeypatch)
    with place(*shared):
        yield


# What it prints


def test_both_networks_are_summarized_the_trained_one_first(finished):
    printed, _ = finished
    before, trained, small = printed.partition("removed from")[0].split("Total params:")
    # CNN((2, 3)): 20 + 57 + 23,530; three filters are left of its five.
    assert trained.split()[0] == "23,607"
    assert int(small.split()[0].replace(",", "")) < 23_607
    assert before.count("Conv2d") == 2


def test_what_was_removed_is_printed_layer_by_layer_as_it_is_recorded(finished, store):
    printed, found = finished
    removed = mlflow.artifacts.load_dict(f"runs:/{found['prune'].info.run_id}/removed.json")
    assert list(removed) == ["network.0", "network.2"]
    assert sum(len(filters) for filters in removed.values()) == 2
    for layer, filters in removed.items():
        assert f"removed from {layer}: {len(filters)} filters {filters}\n" in printed


def test_the_table_has_each_network_and_the_test_set_for_the_final_ones_only(finished):
    printed, found = finished
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert [name for name in rows if name in ("trained", "pruned", "fine-tuned")] == [
        "trained",
        "pruned",
        "fine-tuned",
    ]
    assert rows["trained"][:2] == ["5", "23,607"]
    assert rows["pruned"][:3] == rows["fine-tuned"][:3] and rows["pruned"][0] == "3"
    for name, run in (("trained", "train"), ("fine-tuned", "fine-tune")):
        accuracies = [found[run].data.metrics[key] for key in ("val_accuracy", "test_accuracy")]
        assert rows[name][-2:] == [f"{accuracy:.2%}" for accuracy in accuracies]
    assert [cell.endswith("%") for cell in rows["pruned"]] == [False] * 5 + [True]
    assert rows["pruned"][-1] == f"{found['prune'].data.metrics['val_accuracy']:.2%}"


def test_it_says_where_its_picture_is(finished, store):
    printed, found = finished
    place = printed.partition("scores of all filters: ")[2].splitlines()[0]
    assert Path(place).read_bytes().startswith(b"\x89PNG")
    assert found["prune"].info.run_id in place


def test_the_last_line_says_which_run_it_was_and_where(finished, shared):
    printed, found = finished
    last = printed.splitlines()[-1]
    assert found["parent"].info.run_id in last
    assert shared[1] in last


def test_the_line_before_says_how_to_see_the_runs(finished):
    printed, found = finished
    line = printed.splitlines()[-2]
    assert "`uv run mlflow ui" in line
    assert line.endswith(f"/{tracking.page(found['parent'], curves=True)}")


# What it records


def test_one_run_with_a_finished_child_for_each_step(finished):
    _, found = finished
    assert list(found) == ["parent", "train", "prune", "fine-tune"]
    parent = found["parent"]
    assert parent.data.params["remove"] == "2"
    assert parent.info.run_name.startswith("seed 3, remove 2, channels 2-3, ")
    final = found["fine-tune"].data.metrics
    columns = {"filters", "parameters", "test_loss", "test_accuracy"}
    assert parent.data.metrics == {name: final[name] for name in columns}
    assert final["filters"] == 3 and found["train"].data.metrics["parameters"] == 23_607
    for name, run in found.items():
        assert run.info.status == "FINISHED"
        under = None if run is parent else parent.info.run_id
        assert run.data.tags.get("mlflow.parentRunId") == under, name


def test_settings_are_recorded_with_the_step_they_belong_to(finished):
    _, found = finished
    shared = {"batch_size": "50", "lr": "0.001", "seed": "3"}
    assert found["train"].data.params == {"channels": "(2, 3)", "epochs": "2", **shared}
    assert found["fine-tune"].data.params.items() >= {"epochs": "1", **shared}.items()
    assert found["prune"].data.params == {"criterion": "taylor", "removed": "2"}
    assert "test_accuracy" not in found["prune"].data.metrics


def test_the_steps_of_fine_tuning_follow_those_of_training(finished, store):
    _, found = finished
    client = mlflow.MlflowClient()
    steps = [
        [m.step for m in client.get_metric_history(found[name].info.run_id, "val_accuracy")]
        for name in ("train", "fine-tune")
    ]
    assert steps == [[1, 2], [3]]


def test_the_recorded_networks_are_those_of_the_steps(finished, store):
    _, found = finished
    trained, pruned, tuned = (
        tracking.load_network(found[name].info.run_id) for name in ("train", "prune", "fine-tune")
    )
    assert trained.channels == (2, 3)
    assert sum(pruned.channels) == 3 and pruned.channels == tuned.channels
    images = SPLITS[2].tensors[0]
    with torch.no_grad():
        expected = tuned(images).argmax(1)
    assert torch.equal(tracking.predict(found["fine-tune"].info.run_id, images), expected)


def test_figures_are_recorded_with_the_step_they_show(finished, store):
    _, found = finished
    figures = {
        name: [path for path in artifacts(run.info.run_id) if path.endswith(".png")]
        for name, run in found.items()
    }
    assert figures == {
        "parent": [],
        "train": ["training.png"],
        "prune": ["scores.png"],
        "fine-tune": ["training.png"],
    }


def test_its_training_is_a_baseline_for_the_notebooks(finished, store, monkeypatch):
    _, found = finished
    monkeypatch.setattr(baseline, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    settings = {"epochs": 2, "batch_size": 50, "lr": 1e-3}
    _, run_id = baseline.baseline(*SPLITS, (2, 3), 3, **settings)
    assert run_id == found["train"].info.run_id


def test_nothing_to_remove_and_no_fine_tuning_are_allowed(store, monkeypatch, capsys):
    monkeypatch.setattr(program, "costs", lambda *models: [{"filters": 5}] * 2)
    assert program.main(arguments(remove="0", fine_tune_epochs="0", epochs="1")) == 0
    assert "removed from network.0: 0 filters []" in capsys.readouterr().out


def test_step_by_step_each_removal_is_one_step_of_the_run(store, monkeypatch, capsys):
    tracking.connect()
    before = {run.info.run_id for run in runs()}
    monkeypatch.setattr(program, "costs", lambda *models: [{"filters": 5}] * 2)
    assert program.main([*arguments(epochs="1", channels="3 4"), "--updates", "2"]) == 0
    new = by_name([run for run in runs() if run.info.run_id not in before])
    run_id = new["prune"].info.run_id
    client = mlflow.MlflowClient()
    for name in ("val_loss", "val_accuracy", "filters", "parameters", "macs"):
        assert [m.step for m in client.get_metric_history(run_id, name)] == [1, 2]
    assert [m.value for m in client.get_metric_history(run_id, "filters")] == [6, 5]
    removed = mlflow.artifacts.load_dict(f"runs:/{run_id}/removed.json")
    assert sum(map(len, removed.values())) == 2
    assert sum(tracking.load_network(new["fine-tune"].info.run_id).channels) == 5
    printed = capsys.readouterr().out
    for layer, filters in removed.items():
        assert f"removed from {layer}: {len(filters)} filters {filters}" in printed


def test_step_by_step_the_options_are_used_and_recorded(store, monkeypatch):
    used = {}

    def record(*_, **settings):
        used.update(settings)
        return []

    monkeypatch.setattr(program, "prune_iteratively", record)
    monkeypatch.setattr(program, "costs", lambda *models: [{"filters": 5}] * 2)
    argv = [*arguments(epochs="1"), "--updates", "4", "--per-step", "3"]
    assert program.main(argv) == 0
    assert used == {"filters": 3, "per_step": 3, "updates": 4, "batch_size": 50, "seed": 3}
    params = by_name(runs())["prune"].data.params
    assert params == {"criterion": "taylor", "removed": "2", "updates": "4", "per_step": "3"}


@pytest.mark.parametrize("steps", [(), ("--updates", "1")])
def test_scores_come_from_the_training_images(store, monkeypatch, steps):
    def take(model, data, *others, **_):
        read.append(data)
        raise FloatingPointError("that is enough")

    read = []
    monkeypatch.setattr(program, "prune_iteratively", take)
    monkeypatch.setattr(program, "filter_scores", take)
    assert program.main([*arguments(epochs="1"), *steps]) == 1
    assert len(read) == 1 and read[0].tensors[0] is SPLITS[0].tensors[0]


# Interrupted


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (baseline, "fit", {"parent": "KILLED", "train": "KILLED"}),
        (program, "accuracies", {"parent": "KILLED", "train": "FINISHED"}),
        (
            program,
            "filter_scores",
            {"parent": "KILLED", "train": "FINISHED", "prune": "KILLED"},
        ),
        (
            tracking,
            "log_model",
            {
                "parent": "KILLED",
                "train": "FINISHED",
                "prune": "FINISHED",
                "fine-tune": "KILLED",
            },
        ),
        (
            program,
            "costs",
            {
                "parent": "KILLED",
                "train": "FINISHED",
                "prune": "FINISHED",
                "fine-tune": "FINISHED",
            },
        ),
        (program, "fashion_mnist", {}),
    ],
)
def test_an_interrupt_kills_the_run_and_the_step_it_is_in(
    store, monkeypatch, capsys, owner, name, expected
):
    tracking.connect()
    before = {run.info.run_id for run in runs()}
    monkeypatch.setattr(program, "costs", lambda *models: [{"filters": 5}] * 2)
    monkeypatch.setattr(owner, name, interrupt)
    assert program.main(arguments(epochs="1")) == 130
    new = [run for run in runs() if run.info.run_id not in before]
    assert {name: run.info.status for name, run in by_name(new).items()} == expected
    printed = capsys.readouterr()
    assert "Interrupted" in printed.err and printed.err.count("\n") == 1
    assert mlflow.active_run() is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_program_with_the_status_that_shells_expect(
    store, monkeypatch, capsys, name
):
    number = getattr(signal, name)
    monkeypatch.setattr(program, "fashion_mnist", lambda root: os.kill(os.getpid(), number))
    assert program.main(arguments()) == 128 + number
    printed = capsys.readouterr().err
    assert "Interrupted" in printed and printed.count("\n") == 1


def test_what_mlflow_cannot_record_ends_the_program_in_one_line(store, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mlflow, "log_dict", full)
    assert program.main(arguments(epochs="1")) == 1
    printed = capsys.readouterr().err
    assert "'prune'" in printed and "No space left" in printed and printed.count("\n") == 1


def test_what_stdout_cannot_encode_is_replaced(store, monkeypatch):
    monkeypatch.setattr(program, "experiment", lambda *_: print("├─Conv2d"))
    printed = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(printed, encoding="cp1252")) as stdout:
        assert program.main(arguments()) == 0
        stdout.flush()
    assert printed.getvalue() == b"??Conv2d\n".replace(b"\n", os.linesep.encode())


def test_a_reader_of_its_output_who_has_enough_ends_it_without_a_traceback(
    store, monkeypatch, capsys
):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(program, "experiment", lambda *_: print("a line"))
    with redirect_stdout(os.fdopen(writing, "w")) as stdout:
        assert program.main(arguments()) == 141
    stdout.close()  # Python does at its end, and nothing is left to fail
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device is Linux's")
def test_a_full_disk_behind_its_output_is_one_sentence(store, monkeypatch, capsys):
    monkeypatch.setattr(program, "experiment", lambda *_: print("a line"))
    with redirect_stdout(open("/dev/full", "w")) as stdout:
        assert program.main(arguments()) == 1
    stdout.close()
    printed = capsys.readouterr().err
    assert "can't be written" in printed and "No space left" in printed
    assert printed.count("\n") == 1


# Bad values


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the program with arguments that it must refuse; return the one line it prints."""

    def run(argv):
        here = tmp_path / "here"
        here.mkdir()
        with place(here, f"sqlite:///{(here / 'mlflow.db').as_posix()}"):
            assert status(argv) == 2
        assert list(here.iterdir()) == []
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.endswith("\n") and printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.fixture
def not_recorded(monkeypatch):
    """To connect makes the database, so nothing may come so far."""
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    monkeypatch.setattr(tracking, "connect", lambda: pytest.fail("the value was not refused"))


NO_COUNT = ["-1", "text", "1.5", "", "nan", "1e3"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("channels", value) for value in ["0", "8 0", "-8 16", "8 text", "", "8,16"]),
        *(("remove", value) for value in NO_COUNT),
        *(("epochs", value) for value in ["0", *NO_COUNT]),
        *(("fine_tune_epochs", value) for value in NO_COUNT),
        *(("updates", value) for value in NO_COUNT),
        *(("per_step", value) for value in ["0", *NO_COUNT]),
        *(("batch_size", value) for value in ["0", *NO_COUNT]),
        *(("lr", value) for value in ["0", "-0.001", "text", "nan", "inf", "-inf", "", "1e-999"]),
        *(("seed", value) for value in [*NO_COUNT, str(2**64)]),
        *(("device", value) for value in ["text", "0", "", "tpu9", "cuda:99", "meta", "hpu"]),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_option(
    refused, not_recorded, option, value
):
    assert f"--{option.replace('_', '-')}" in refused(arguments(**{option: value}))


@pytest.mark.parametrize("count", ["4", "5", "1000"])
def test_more_filters_than_the_layers_can_spare_are_refused(refused, not_recorded, count):
    assert count in refused(arguments(remove=count))  # 2 + 3, and each keeps one


@pytest.mark.parametrize("argv", [["--colour", "3"], ["text"], ["--epochs"], ["--channels"]])
def test_unknown_options_and_missing_values_are_refused(refused, not_recorded, argv):
    assert argv[0] in refused(argv)


def test_a_file_in_place_of_the_data_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refused(arguments(data=str(tmp_path / "file")))


def test_a_missing_data_folder_is_refused_where_nothing_can_be_downloaded(
    refused, tmp_path, monkeypatch
):
    with no_server() as uri:
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"{uri}/"])
        assert "missing" in refused(arguments(data=str(tmp_path / "missing")))
    assert not (tmp_path / "missing").exists()


def test_a_server_that_does_not_answer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    with no_server() as uri, place(tmp_path, uri):
        assert status(arguments()) == 2
    printed = capsys.readouterr().err
    assert uri in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_mlflow_does_not_know_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    with place(tmp_path, "nonsense://here"):
        assert status(arguments()) == 2
    printed = capsys.readouterr().err
    assert "nonsense" in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_to_parse_opens_neither_the_data_nor_the_store(not_recorded, monkeypatch):
    monkeypatch.setattr(program, "fashion_mnist", lambda root: pytest.fail("the data were read"))
    options = program.parse(arguments(data="missing"))
    assert (options.channels, options.remove, options.data.name) == ([2, 3], 2, "missing")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_option(not_recorded, capsys, option):
    with pytest.raises(SystemExit) as stop:
        program.main([option])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in (*SMALL, "--device", "--data"):
        assert name in printed
