"""What a call leaves behind when it is cut off: nothing, and the error as it was raised."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from networks import assert_same, state_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import CNN, TaylorPruner, evaluate, filter_scores, fit, mask_filters, normalize
from cnn_pruning.experiments.progress import progress
from cnn_pruning.experiments.training import refresh_batch_norms
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, latency
from cnn_pruning.scores import select_filters


class Plan(dict):
    """One for a network and all its copies."""

    def __deepcopy__(self, memo):
        return self


class Watched(nn.Module):
    """A network that raises ``error`` at its pass number ``fails``, all copies together."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(64, 3)
        self.plan = Plan(fails=None, passes=0)
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, x):
        self.plan["passes"] += 1
        if self.plan["passes"] == self.plan["fails"]:
            raise self.plan["error"]
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        return self.head(torch.flatten(x, 1)) * self.unsaved


generator = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.rand(6, 1, 6, 6, generator=generator), torch.arange(6) % 3)


def masked(model, data):
    with mask_filters(model, {"conv": [1]}, data):
        model(data.tensors[0])


CALLS = {
    "evaluate": evaluate,
    "taylor": lambda m, d: filter_scores(m, d, batch_size=3),
    "obd": lambda m, d: filter_scores(m, d, "obd"),
    "oracle": lambda m, d: filter_scores(m, d, "oracle"),
    "activation_std": lambda m, d: filter_scores(m, d, "activation_std"),
    "mask_filters": masked,
    "count_macs": lambda m, d: count_macs(m, (1, 6, 6)),
    "latency": lambda m, d: latency(m, batch_size=2, repeats=2, image_shape=(1, 6, 6)),
    "fit": lambda m, d: fit(m, d, d, epochs=2, batch_size=3),
    "prune_iteratively": lambda m, d: [
        *prune_iteratively(m, d, d, filters=2, updates=2, batch_size=3)
    ],
    "refresh_batch_norms": refresh_batch_norms,
    "TaylorPruner": lambda m, d: TaylorPruner(m).score(d),
}
ERRORS = [torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), ArithmeticError("mine")]


def prepared():
    model = Watched()
    model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
    model.conv.train(), model.norm.eval()
    model.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("error", ERRORS, ids=["memory", "interrupt", "another"])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_any_pass_comes_through_as_itself_and_nothing_is_left(call, error):
    model = prepared()
    torch.backends.mha.set_fastpath_enabled(True)
    modes = state_of(prepared())["modes"]
    CALLS[call](counted := prepared(), DATA)
    assert state_of(counted)["modes"] == modes
    passes = counted.plan["passes"]
    assert passes > 0
    for fails in sorted({1, (passes + 1) // 2, passes}):
        model = prepared()
        model.plan |= {"fails": fails, "error": error}
        before = state_of(model, *DATA.tensors)
        with pytest.raises(type(error)) as raised:
            CALLS[call](model, DATA)
        assert raised.value is error
        after = state_of(model, *DATA.tensors)
        if call == "fit" and isinstance(error, KeyboardInterrupt):
            after.pop("values"), before.pop("values")  # those reached
        assert_same(after, before)


def fail_in_backward(error):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise error

    return lambda outputs, labels: Fails.apply(cross_entropy(outputs, labels, reduction="none"))


def fail(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize("where", ["cost", "backward", "criterion"])
@pytest.mark.parametrize("error", ERRORS, ids=["memory", "interrupt", "another"])
def test_what_the_callers_functions_raise_comes_through_as_itself(where, error):
    model = CNN((2, 3)) if where == "backward" else prepared()
    images = torch.rand(6, 1, 28, 28) if where == "backward" else DATA.tensors[0]
    data = TensorDataset(images, DATA.tensors[1])
    options = {"cost": fail(error)}
    if where == "backward":
        options = {"cost": fail_in_backward(error)}
    if where == "criterion":
        options = {"criterion": fail(error)}
    uses = [
        lambda: filter_scores(model, data, **options),
        lambda: next(prune_iteratively(model, data, data, filters=2, updates=1, **options)),
        lambda: next(prune_iteratively(model, data, data, filters=2, updates=0, **options)),
    ]
    if where != "criterion":
        uses += [
            lambda: fit(model, data, data, epochs=1, **options),
            lambda: filter_scores(model, data, "obd", **options),
        ]
    if where == "cost":
        uses += [
            lambda: evaluate(model, data, **options),
            lambda: filter_scores(model, data, "oracle", **options),
        ]
    for use in uses:
        before = state_of(model, *data.tensors)
        with pytest.raises(type(error)) as raised:
            use()
        assert raised.value is error
        assert_same(state_of(model, *data.tensors), before)


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == 5:
            raise self.error
        return DATA[i]


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt(), IndexError("mine")])
def test_what_a_dataset_raises_comes_through_as_itself(error):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    before, data = state_of(model), Broken(error)
    for use in (
        lambda: evaluate(model, data, batch_size=2),
        lambda: filter_scores(model, data, batch_size=2),
        lambda: filter_scores(model, data, "obd", batch_size=2),
        lambda: next(prune_iteratively(model, data, DATA, filters=1, updates=0, batch_size=2)),
    ):
        with pytest.raises(type(error)) as raised:
            use()
        assert raised.value is error
        assert_same(state_of(model), before)


def test_only_a_mini_batch_of_one_image_is_called_so_and_only_for_batch_norm():
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(2)),
        nn.Linear(2, 3),
    )
    before = state_of(model)
    for size in (1, 5):  # each is one, or the last is
        for use in (
            lambda size=size: fit(model, DATA, DATA, epochs=1, batch_size=size),
            lambda size=size: next(
                prune_iteratively(model, DATA, DATA, filters=1, updates=1, batch_size=size)
            ),
        ):
            with pytest.raises(
                ValueError, match=rf"batches of {size} leave one of a single image,"
            ):
                use()
    assert_same(state_of(model), before)
    for size in (2, 3, 4, 6, 100):
        fit(model, DATA, DATA, epochs=1, batch_size=size)
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    fit(plain, DATA, DATA, epochs=1, batch_size=1)  # an image has many positions


@pytest.mark.parametrize("given", [["0"], ("0",), {"0"}, {"0": 1}])
def test_what_names_layers_or_filters_is_read_and_not_changed(given):
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )
    before = copy.deepcopy(given)
    least, multiples, filters = {"2": 2}, {"2": 2}, {"2": [3, 1]}
    scores = filter_scores(model, DATA, keep=given)
    assert list(scores) == ["2"]
    pruner = TaylorPruner(model, keep=given, min_filters=least, multiple_of=multiples)
    found = copy.deepcopy(pruner.score(DATA))
    pruner.select(1), pruner.prune(parameters=0.9), pruner.prune(2)
    assert_same(pruner.scores, found)
    list(prune_iteratively(model, DATA, DATA, filters=6, keep=given, min_filters=least, updates=0))
    with mask_filters(model, filters):
        pass
    select_filters(normalize(found), 1, least, given, multiple_of=multiples)
    assert given == before
    assert (least, multiples, filters) == ({"2": 2}, {"2": 2}, {"2": [3, 1]})
    if isinstance(given, list):  # what the caller does to it later is his own
        given.append("2")
        assert sum(map(len, pruner.select(1).values())) in (0, 1)
        assert pruner.prune(2)[2].out_channels == 2


# The progress bar


@pytest.fixture
def notebook(monkeypatch):
    """What a bar shows, in a notebook."""
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html)

    def display(html, display_id):
        shown.append(html)
        return Handle()

    fake = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    screen = SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    return shown


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), GeneratorExit()])
def test_a_bar_in_a_notebook_lets_errors_through_and_says_where_it_stopped(notebook, error):
    with pytest.raises(type(error)) as raised, progress(7, "training") as advance:
        for _ in range(3):
            advance()
        raise error
    assert raised.value is error
    assert notebook[0] == "training"
    assert notebook[-1] == "training: stopped at step 3 of 7"


def test_a_bar_in_a_notebook_ends_as_a_line(notebook, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    with progress(3, "pruning") as advance:
        for _ in range(3):
            advance()
    assert [text.count("<progress") for text in notebook] == [0, 1, 1, 1, 0]
    values = [text.partition("value='")[2].partition("'")[0] for text in notebook[1:-1]]
    assert values == ["1", "2", "3"] and all("max='3'" in text for text in notebook[1:-1])
    assert notebook[-1].startswith("pruning: ") and notebook[-1].endswith(".0 s")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_training_is_cut_off_in_a_notebook_as_elsewhere(notebook, error):
    def stop(row):
        raise error

    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    before = state_of(model)
    with pytest.raises(error):
        fit(model, DATA, DATA, epochs=2, batch_size=2, on_epoch=stop)
    assert notebook[-1] == "training: stopped at step 3 of 6"
    after = state_of(model)
    assert torch.equal(after["values"]["1.weight"], before["values"]["1.weight"]) == (
        error is ValueError
    )
