"""What is shown, in the table and the figures of the command: each number in its place."""

import inspect
import re
from unittest import mock

import matplotlib
import pytest
import torch
from networks import assert_same
from stores import dataset

import cnn_pruning.__main__ as program
from cnn_pruning import CNN, TaylorPruner, evaluate, filter_scores, fit, measure, plots
from cnn_pruning.baseline import baseline
from cnn_pruning.experiments.ranks import RankLost
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import costs, latency
from cnn_pruning.tracking import NotRecorded

SPLITS = dataset(30), dataset(20, seed=1), dataset(17, seed=2)
COSTS = [
    {"filters": 5, "parameters": 12345, "MACs": 67890, "ms, batch 1": 1.234, "ms, batch 512": 56.7},
    {"filters": 3, "parameters": 2345, "MACs": 7890, "ms, batch 1": 0.987, "ms, batch 512": 45.6},
]


def run(monkeypatch, capsys, *more):
    """The command without a store: what it printed, its figures, and the networks it trained."""
    trained, figures = [], {}

    def fit_and_log(model, *_, **settings):
        trained.append((dict(model.state_dict()), settings, model))
        with torch.no_grad():  # another network than before
            model.network[-1].bias[len(trained)] += 1

    tracking = mock.MagicMock(NotRecorded=NotRecorded)
    tracking.where_to_look = lambda parent: "the last line"
    tracking.log_figure = lambda figure, name: figures.setdefault(name, figure) and name
    monkeypatch.setattr(program, "tracking", tracking)
    monkeypatch.setattr(program, "fit_and_log", fit_and_log)
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    monkeypatch.setattr(program, "costs", lambda *models: COSTS)
    argv = ["--channels", "2", "3", "--remove", "2", "--seed", "5", *more]
    assert program.main(argv) == 0
    return capsys.readouterr().out, figures, trained, tracking


def table(printed):
    header = next(line for line in printed.splitlines() if "val accuracy" in line)
    names = re.split(r"\s{2,}", header.strip())
    rows = [
        line.split() for line in printed.splitlines() if re.match(r"(trained|pruned|fine-)", line)
    ]
    return names, {row[0]: row[1:] for row in rows}


def test_each_number_stands_in_its_column(monkeypatch, capsys):
    printed, _, trained, tracking = run(monkeypatch, capsys)
    header = next(line for line in printed.splitlines() if "val accuracy" in line)
    places = [header.index(name) + len(name) for name in (*COSTS[0], "val accuracy")]
    assert places == sorted(places)
    _, rows = table(printed)
    assert list(rows) == ["trained", "pruned", "fine-tuned"]
    whole, small = (
        ["5", "12,345", "67,890", "1.23", "56.7"],
        ["3", "2,345", "7,890", "0.99", "45.6"],
    )
    assert [rows[name][:5] for name in rows] == [whole, small, small]
    last = [model for *_, model in trained]
    for name, model in (("trained", last[0]), ("fine-tuned", last[1])):
        expected = [f"{evaluate(model, data)[1]:.2%}" for data in SPLITS[1:]]
        assert rows[name][5:] == expected
    assert len(rows["pruned"]) == 6
    assert [settings["epochs"] for _, settings, _ in trained] == [5, 5]
    assert printed.rstrip().endswith("the last line")
    (stage,) = tracking.set_stage.call_args_list
    assert stage.args == ("baseline",)


@pytest.mark.parametrize("seed", ["5", "6"])
def test_the_first_weights_are_those_of_the_seed(monkeypatch, capsys, seed):
    _, _, trained, _ = run(monkeypatch, capsys, "--seed", seed, "--epochs", "3")
    torch.manual_seed(int(seed))
    expected = CNN((2, 3))
    found, settings, model = trained[0]
    assert_same(found["network.0.weight"], expected.network[0].weight.detach())
    assert settings == {"epochs": 3, "batch_size": 128, "lr": 3e-3, "seed": int(seed)}
    assert model.channels == (2, 3) and sum(trained[1][2].channels) == 3


def test_the_figure_of_the_scores_hatches_what_goes(monkeypatch, capsys):
    printed, figures, _, tracking = run(monkeypatch, capsys)
    (removed, name), _ = tracking.log_dict.call_args
    assert name == "removed.json"
    for axis, (layer, filters) in zip(figures["scores.png"].axes, removed.items(), strict=True):
        heights = torch.tensor([bar.get_height() for bar in axis.patches], dtype=torch.float64)
        assert heights.norm().item() == pytest.approx(1, abs=1e-5)  # normalized
        hatched = [k for k, bar in enumerate(axis.patches) if bar.get_hatch()]
        assert hatched == filters
        assert f"removed from {layer}: {len(filters)} filters {filters}" in printed
    assert sum(map(len, removed.values())) == 2


def test_the_figure_of_the_steps_has_what_went_and_the_accuracy_then(monkeypatch, capsys):
    printed, figures, _, tracking = run(monkeypatch, capsys, "--updates", "1", "--batch-size", "9")
    (axis,) = figures["accuracy.png"].axes
    line = axis.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 1, 2]
    steps = [call.args for call in tracking.log_metrics.call_args_list]
    assert [step for _, step in steps] == [1, 2]
    assert [values["filters"] for values, _ in steps] == [4, 3]
    percent = [100 * values["val_accuracy"] for values, _ in steps]
    assert line.get_ydata().tolist()[1:] == pytest.approx(percent)
    assert axis.get_xlabel() == "filters removed, 1 updates before each step"
    assert axis.get_ylabel() == "validation accuracy (%)" and axis.get_ylim() == (0, 100)
    _, rows = table(printed)
    assert rows["pruned"][5] == f"{steps[-1][0]['val_accuracy']:.2%}"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt(15), 143, "Interrupted."),
        (FloatingPointError("not finite"), 1, "not finite"),
        (RankLost("gone"), 1, "gone"),
        (NotRecorded("not kept"), 1, "not kept"),
    ],
)
def test_how_it_ends_is_one_line_with_the_notes(monkeypatch, capsys, error, status, said):
    def fail(*_):
        raise error

    if isinstance(error, KeyboardInterrupt):
        error.__notes__ = ["The run 'train' is marked as KILLED.", "More."]
        said += " The run 'train' is marked as KILLED. More."
    monkeypatch.setattr(program, "fashion_mnist", lambda root: SPLITS)
    monkeypatch.setattr(program.tracking, "connect", lambda: None)
    monkeypatch.setattr(program, "experiment", fail)
    assert program.main(["--remove", "1"]) == status
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{said}\n")


@pytest.mark.parametrize(("option", "least", "most"), [("--remove", 0, 3), ("--epochs", 1, 10_000)])
def test_an_option_takes_its_limits_and_nothing_beyond(option, least, most):
    for value in (least, most):
        options = program.parse(["--channels", "2", "3", "--remove", "0", option, str(value)])
        assert vars(options)[option.strip("-")] == value
    for value in (least - 1, most + 1):
        with pytest.raises(SystemExit) as stop:
            program.parse(["--channels", "2", "3", "--remove", "0", option, str(value)])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("text", "right"), [("1", 1), ("1.0001", 0), ("0", 0), ("1e-9", 1), ("x", 0)]
)
def test_the_learning_rate_is_above_0_and_at_most_1(text, right):
    if right:
        assert program.parse(["--lr", text]).lr == float(text)
    else:
        with pytest.raises(SystemExit):
            program.parse(["--lr", text])


def defaults(function):
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def test_the_command_the_notebooks_and_the_functions_have_the_same_defaults():
    options = vars(program.parse([]))
    trained = {name: options[name] for name in ("epochs", "batch_size", "lr")}
    assert trained == {"epochs": 5, "batch_size": 128, "lr": 3e-3}
    for function in (fit, baseline):
        assert {name: defaults(function)[name] for name in trained} == trained
    assert options["fine_tune_epochs"] == options["epochs"]
    assert tuple(options["channels"]) == CNN().channels == defaults(baseline)["channels"] == (8, 16)
    for function in (evaluate, filter_scores, TaylorPruner.score):
        assert defaults(function)["batch_size"] == 128
    assert defaults(prune_iteratively)["batch_size"] == 32
    assert defaults(prune_iteratively)["lr"] == 1e-3
    assert (options["remove"], options["seed"], options["updates"]) == (7, 1, None)


# Measured


def test_what_a_network_costs_stands_in_its_column(monkeypatch):
    def measured(*models, batch_size, repeats=30):
        assert repeats == (30 if batch_size == 1 else 15)
        return [(batch_size + i, -1, 1e6) for i in range(len(models))]

    monkeypatch.setattr(measure, "latency", measured)
    rows = costs(CNN((2, 3)), CNN((1,)))
    weights = [(9 + 1) * 2 + (18 + 1) * 3 + (3 * 784 + 1) * 10, 10 + 7850]
    macs = [784 * 9 * (2 + 6) + 3 * 7840, 784 * 9 + 7840]
    assert [list(row.values()) for row in rows] == [
        [filters, weights[i], macs[i], 1 + i, 512 + i] for i, filters in enumerate((5, 1))
    ]


def test_models_take_turns_in_both_orders():
    turns = []

    class Named(CNN):
        name = ""

        def forward(self, images):
            turns.append(self.name)
            return super().forward(images)

    models = Named((1,)), Named((1,))
    models[0].name, models[1].name = "a", "b"
    latency(*models, batch_size=1, repeats=12)
    rounds = ["".join(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    assert len(rounds) == 5 + 12
    assert {*rounds} == {"ab", "ba"}
    assert 3 < rounds.count("ab") < 14


# Figures


def test_curves_are_by_epoch_with_the_losses_above_and_the_accuracy_below():
    rows = [
        {
            "epoch": 2 * i,
            "val_loss": 2.0 / (i + 1),
            "val_accuracy": 0.1 * i,
            "train_loss": 3.0 / (i + 1),
        }
        for i in range(4)
    ]
    del rows[0]["train_loss"]  # before training
    figure = plots.curves({"taylor": rows, "network": rows[:2]}, "What it is")
    above, below = figure.axes
    solid, dotted = above.get_lines()[:2]
    assert solid.get_xdata().tolist() == dotted.get_xdata().tolist() == [0, 2, 4, 6]
    assert solid.get_ydata().tolist() == [row["val_loss"] for row in rows]
    assert dotted.get_ydata().tolist()[1:] == [row["train_loss"] for row in rows[1:]]
    assert dotted.get_linestyle() == ":" and solid.get_linestyle() == "-"
    assert solid.get_color() == dotted.get_color() == plots.METHODS["taylor"]
    assert below.get_lines()[0].get_ydata().tolist() == pytest.approx([0, 10, 20, 30])
    assert "nats" in above.get_ylabel() and "%" in below.get_ylabel()
    assert below.get_xlabel() == "epoch" and figure.get_suptitle() == "What it is"
    for axis in (above, below):
        assert {text.get_text() for text in axis.texts} == {"network", "Taylor"}


def test_bars_are_the_scores_with_the_layers_side_by_side_on_one_scale():
    scores = {"a": torch.tensor([0.5, -0.25]), "b": torch.tensor([1.0, 2.0, 3.0])}
    figure = plots.score_bars(scores, "the score", "Two layers", {"b": [2, 0]})
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == [0.5, -0.25]
    assert [bar.get_height() for bar in second.patches] == [1.0, 2.0, 3.0]
    assert [bool(bar.get_hatch()) for bar in (*first.patches, *second.patches)] == [
        *(False, False),
        *(True, False, True),
    ]
    assert first.get_ylim() == second.get_ylim()
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "filter of the first layer",
        "filter of the second layer",
    ]
    assert (first.get_ylabel(), second.get_ylabel()) == ("the score", "")
    colors = [matplotlib.colors.to_hex(axis.patches[1].get_facecolor()) for axis in figure.axes]
    assert [color.upper() for color in colors] == list(plots.LAYERS[:2])
    many = {str(i): torch.ones(1) for i in range(6)}
    assert [axis.get_xlabel() for axis in plots.score_bars(many, "", "").axes][-2:] == [
        "filter of 4",
        "filter of 5",
    ]
