import copy
import math
import signal
import sys
import time
import weakref
from itertools import chain

import pytest
import torch
from networks import assert_same, state_of
from stores import Pairs
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from cnn_pruning import CNN, evaluate, filter_scores, fit
from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.training import mixed_precision, refresh_batch_norms
from cnn_pruning.iterative import prune_iteratively


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 2),
        )


def with_dropout():
    model = network()
    return nn.Sequential(*model[:3], nn.Dropout(0.5), *model[3:])


def bright_or_dark(size, seed=0):
    """Images of 4 x 4 whose label says which half of them is the brighter one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=generator)
    images = torch.rand(size, 1, 4, 4, generator=generator)
    images[labels == 0, :, :2] += 0.5
    images[labels == 1, :, 2:] += 0.5
    return TensorDataset(images, labels)


TRAIN, VAL = bright_or_dark(40), bright_or_dark(20, seed=1)
EMPTY = TensorDataset(torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64))


# Evaluating


def test_evaluation_is_the_mean_cross_entropy_and_the_share_of_right_answers():
    model = network().double()
    images, labels = VAL.tensors[0].double(), VAL.tensors[1]
    loss, accuracy = evaluate(model, TensorDataset(images, labels))
    with torch.no_grad():
        probabilities = copy.deepcopy(model).eval()(images).softmax(1)
    expected = -sum(
        row[label].log() for row, label in zip(probabilities, labels, strict=True)
    ) / len(labels)
    right = sum(
        int(row[label] == row.max()) for row, label in zip(probabilities, labels, strict=True)
    )
    assert loss == pytest.approx(expected.item())  # float64: rounding only
    assert accuracy == right / len(labels)
    assert (type(loss), type(accuracy)) == (float, float)


def test_evaluation_on_logits_worked_out_by_hand():
    # Logits of (0, ln 3) and (ln 3, 0): the label's probability is 3/4, 1/4 and 3/4.
    high = torch.log(torch.tensor(3.0))
    data = TensorDataset(torch.tensor([[0, high], [0, high], [high, 0]]), torch.tensor([1, 0, 0]))
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    loss, accuracy = evaluate(model, data)
    assert loss == pytest.approx((2 * 0.287682 + 1.386294) / 3, rel=1e-5)  # six digits given
    assert accuracy == 2 / 3


@pytest.mark.parametrize("batch_size", [1, 3, 19, 100])
def test_evaluation_does_not_depend_on_the_batch_size_or_the_kind_of_dataset(batch_size):
    model = network()
    expected = evaluate(model, VAL)
    for data in (VAL, Pairs(VAL)):
        # float32: rounding only
        assert evaluate(model, data, batch_size) == pytest.approx(expected, rel=1e-5)


def test_a_large_batch_is_evaluated_in_pieces_so_that_the_memory_does_not_grow_with_it():
    model, sizes = network(), []
    model[0].register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    data = bright_or_dark(300)
    found = evaluate(model, data, batch_size=300)
    assert sum(sizes) == 300 and 32 <= max(sizes) <= 128
    assert found == pytest.approx(evaluate(model, data, batch_size=25), rel=1e-5)  # rounding only


def test_evaluation_leaves_nothing_behind():
    model = network()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    for data in (VAL, Pairs(VAL)):
        evaluate(model, data)
    assert_same(state_of(model), before)
    assert torch.is_grad_enabled()


def test_evaluation_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        evaluate(network(), EMPTY)


# Training


def test_a_simple_task_is_learned():
    model = network()
    history = fit(model, TRAIN, VAL, epochs=20, batch_size=8, lr=1e-2)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert evaluate(model, TRAIN)[1] == 1  # half against half differs by 0.5 on average
    assert history[-1]["val_accuracy"] >= 0.9


def test_training_is_adam_with_a_rate_that_falls_from_update_to_update_to_a_hundredth():
    model = with_dropout().double()
    images, labels = TRAIN.tensors[0][:23].double(), TRAIN.tensors[1][:23]
    data, lr, epochs, seed = TensorDataset(images, labels), 0.02, 3, 5
    expected = copy.deepcopy(model).train()
    loader = batches(data, 5, torch.Generator().manual_seed(seed))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected.parameters()]
    step, steps = 0, epochs * 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for x, y in loader:
                slopes = torch.autograd.grad(cross_entropy(expected(x), y), expected.parameters())
                rate = lr * (1 - 0.99 * step / steps)
                step += 1
                parameters = zip(expected.parameters(), slopes, moments, strict=True)
                for p, slope, (first, second) in parameters:
                    first.mul_(0.9).add_(0.1 * slope)
                    second.mul_(0.999).add_(0.001 * slope.square())
                    size = (second / (1 - 0.999**step)).sqrt() + 1e-8
                    p.data -= rate * first / (1 - 0.9**step) / size
    fit(model, data, data, epochs, batch_size=5, lr=lr, seed=seed)
    assert_close(model.state_dict(), expected.state_dict())  # float64: rounding only


@pytest.mark.parametrize("lr", [1e30, 1e-2])
def test_training_that_fails_leaves_the_weights_as_they_were(lr):
    model = network().double()
    data = TensorDataset(TRAIN.tensors[0].double(), TRAIN.tensors[1])
    before = state_of(model)

    def fail(row):
        raise OSError

    with pytest.raises((FloatingPointError, OSError)):
        fit(model, data, data, lr=lr, batch_size=8, on_epoch=fail)
    assert_same(state_of(model), before)


def test_what_on_epoch_does_to_its_row_does_not_change_the_history():
    history = fit(network(), TRAIN, VAL, epochs=1, on_epoch=lambda row: row.clear())
    assert history[0]["epoch"] == 1


def test_every_epoch_is_a_row_and_on_epoch_sees_it_at_once():
    model, seen = network(), []

    def on_epoch(row):
        # The row describes the network as it is now.
        assert evaluate(model, VAL) == (row["val_loss"], row["val_accuracy"])
        seen.append(dict(row))

    history = fit(model, TRAIN, VAL, epochs=3, on_epoch=on_epoch)
    assert history == seen
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert list(row) == ["epoch", "train_loss", "val_loss", "val_accuracy"]


def test_the_training_loss_is_the_mean_over_the_examples_whatever_the_last_batch():
    # A learning rate too small to change anything: every batch sees the same network.
    images, labels = bright_or_dark(11).tensors
    data = TensorDataset(images.double(), labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    expected, _ = evaluate(model, data)
    history = fit(model, data, data, epochs=1, batch_size=5, lr=1e-30)
    assert history[0]["train_loss"] == pytest.approx(expected)  # float64: rounding only


@pytest.mark.parametrize("label", [-100, -1, 2])
def test_a_label_without_an_output_is_an_error_before_anything_changes(label):
    images, labels = TRAIN.tensors[0][:8], TRAIN.tensors[1][:8].clone()
    labels[5] = label
    model = network()
    before = state_of(model)
    for use in (
        lambda data: evaluate(model, data),
        lambda data: fit(model, data, VAL, epochs=1, batch_size=8),
    ):
        with pytest.raises(ValueError, match=r"labels must be from 0 to 1.* go from"):
            use(TensorDataset(images, labels))
    assert_same(state_of(model), before)


@pytest.fixture
def bfloat16(monkeypatch):
    """A processor that multiplies in bfloat16 fast; others can do it, too, slowly."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def images(size):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(size, 1, 28, 28, generator=generator), torch.arange(size) % 10)


def test_mixed_precision_stays_near_float32_and_leaves_float32_weights(bfloat16):
    torch.manual_seed(0)
    model, data = CNN((2, 3)), images(11)
    expected, _ = evaluate(model, data)
    history = fit(model, data, data, epochs=1, batch_size=5, lr=1e-30)
    assert history[0]["train_loss"] != expected  # it is used
    assert history[0]["train_loss"] == pytest.approx(expected, rel=2**-6)  # bfloat16: 2**-8 a step
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "mixed"),
    [
        (CNN((2,)), True),
        (CNN((2,)).double(), False),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), False),
    ],
    ids=["float32", "float64", "another network"],
)
def test_only_float32_networks_of_the_tutorial_are_mixed(model, mixed, bfloat16):
    with mixed_precision(model):
        assert torch.is_autocast_enabled("cpu") == mixed


def test_on_epoch_must_be_a_function_of_a_row_from_the_start():
    model = network()
    before = state_of(model)
    for wrong in (1, "print", lambda: None):
        with pytest.raises(TypeError, match=r"on_epoch must be a function of \(row\)"):
            fit(model, TRAIN, VAL, epochs=1, on_epoch=wrong)
    assert_same(state_of(model), before)


def test_an_epoch_shows_every_example_once_in_another_order():
    shown = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 2)

        def forward(self, x):
            if self.training:
                shown.append(x.flatten().tolist())
            return self.linear(x)

    data = TensorDataset(torch.arange(10.0).view(10, 1), torch.arange(10) % 2)
    fit(Watched(), data, data, epochs=2, batch_size=4)
    assert [len(batch) for batch in shown] == [4, 4, 2, 4, 4, 2]
    first, second = [*chain(*shown[:3])], [*chain(*shown[3:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert list(range(10)) not in (first, second)


@pytest.mark.parametrize("kind", [lambda data: data, Pairs])
def test_the_same_seed_gives_the_same_network_and_another_seed_another(kind):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # the caller's random numbers play no part
        model = network()
        history = fit(model, kind(TRAIN), VAL, epochs=2, batch_size=8, seed=seed)
        runs.append((history, model.state_dict()))
    assert_same(runs[0], runs[1])
    assert runs[0][0] != runs[2][0]
    assert not torch.equal(runs[0][1]["4.weight"], runs[2][1]["4.weight"])


def test_training_leaves_the_callers_random_numbers_and_the_flags_as_they_were():
    model = network()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = state_of(model)
    for data in (TRAIN, Pairs(TRAIN)):
        fit(model, data, VAL, epochs=1, batch_size=8)
    for part, after in state_of(model).items():
        if part != "values":
            assert_same(after, before[part])


def test_the_network_is_in_training_mode_while_it_is_trained():
    model = network().eval()
    fit(model, TRAIN, VAL, epochs=1, batch_size=8)
    assert model[1].num_batches_tracked == 5
    assert not any(module.training for module in model.modules())


def test_flags_are_restored_when_training_is_stopped():
    def stop(row):
        raise KeyboardInterrupt

    model = network().eval()
    with pytest.raises(KeyboardInterrupt):
        fit(model, TRAIN, VAL, on_epoch=stop)
    assert not any(module.training for module in model.modules())


def test_an_interrupt_that_python_ignores_stops_training_outside_a_run():
    class Object:
        pass

    def in_callback(_):
        signal.raise_signal(signal.SIGINT)

    def ask(row):
        thing = Object()
        watched.append(weakref.ref(thing, in_callback))
        del thing  # Python ignores what a weak reference's callback raises
        rows.append(row)
        time.sleep(0.2)

    watched, rows, before = [], [], sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        fit(network(), TRAIN, VAL, epochs=100, on_epoch=ask)
    assert len(rows) == 1 and sys.unraisablehook is before


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fit(model, TRAIN, VAL, epochs=1)
    assert_same(model[0].weight.detach(), before["0.weight"])
    assert not torch.equal(model[4].weight, before["4.weight"])


def test_no_epochs_change_nothing():
    model = network()
    before = state_of(model)
    assert fit(model, TRAIN, VAL, epochs=0) == []
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs .*-1"),
        ({"epochs": 1.0}, "epochs .*1.0"),
        ({"epochs": True}, "epochs .*True"),
        ({"lr": 0}, "lr .*0"),
        ({"lr": -1e-3}, "lr .*-0.001"),
        ({"lr": float("nan")}, "lr .*nan"),
        ({"lr": float("inf")}, "lr .*inf"),
        ({"batch_size": 0}, "batch_size .*0"),
        ({"batch_size": 2.5}, "batch_size .*2.5"),
        ({"train": EMPTY}, "empty"),
        ({"val": EMPTY}, "empty"),
    ],
)
def test_what_is_out_of_range_is_an_error_and_the_network_is_unchanged(options, message):
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        fit(model, **{"train": TRAIN, "val": VAL, "epochs": 1, **options})
    assert_same(state_of(model), before)


@pytest.mark.parametrize("batch_size", [8, 40])
def test_a_loss_that_is_no_longer_finite_is_an_error(batch_size):
    # With one batch of all 40, only the loss on the validation set can show it.
    # Two layers whose weights are near 1e30 overflow; a ReLU between them might be dead instead.
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Linear(4, 10)).eval()
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(40) % 10)
    with pytest.raises(FloatingPointError, match=r"epoch 1.*1e\+30"):
        fit(model, data, data, epochs=1, batch_size=batch_size, lr=1e30)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)],
    ids=["a batch norm without weights", "an instance norm"],
)
def test_other_norms_with_statistics_can_be_frozen_as_well(norm):
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).requires_grad_(False)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    norm.eval()
    fit(model, data, data, epochs=1, batch_size=6)
    refresh_batch_norms(model, data)
    assert (norm.running_mean == 0).all() and model[4].running_mean.any()
    norm.train()
    fit(model, data, data, epochs=1, batch_size=6)
    assert norm.running_mean.any()


def test_a_norm_of_which_a_part_is_trained_is_not_frozen():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    model[1].eval().weight.requires_grad_(False)
    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    fit(model, data, data, epochs=1, batch_size=6)
    assert model[1].running_mean.any()


def test_a_whole_network_in_evaluation_mode_learns_the_statistics_of_norms_without_weights():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    fit(model.eval(), data, data, epochs=1, batch_size=6)
    assert model[1].running_mean.any()


def test_of_one_output_there_is_no_accuracy():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
    data = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 0, 1]))

    def cost(outputs, labels):
        return (outputs[:, 0] - labels).square()

    loss, accuracy = evaluate(model, data, cost=cost)
    assert math.isfinite(loss) and math.isnan(accuracy)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norms_keep_their_statistics_and_others_learn_them(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )
    model[1].requires_grad_(not frozen).eval()
    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    fit(model, data, data, epochs=1, batch_size=6)
    assert not model[1].training and model[4].training
    (step,) = prune_iteratively(model, data, data, filters=7, updates=2, keep=["0"])
    for network in (model, step.model):
        assert (network[1].running_mean == 0).all() == frozen
        assert network[4].running_mean.any()


def test_one_output_is_refused_because_its_cross_entropy_is_always_zero():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
    data = TensorDataset(torch.rand(6, 1, 8, 8), torch.zeros(6).long())
    for use in (
        lambda: evaluate(model, data),
        lambda: fit(model, data, data),
        lambda: filter_scores(model, data),
        lambda: filter_scores(model, data, "oracle"),
    ):
        with pytest.raises(ValueError, match=r"has one output.*give a cost"):
            use()

    def cost(outputs, labels):
        return nn.functional.softplus(outputs[:, 0])

    assert all(values.any() for values in filter_scores(model, data, cost=cost).values())


# Statistics taken anew


class TwoInputs(nn.Module):
    """A network of two inputs whose batch norm sees their sum."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, momentum=0.3)
        self.linear = nn.Linear(16, 2)

    def forward(self, left, right):
        return self.linear(self.norm(left + right).flatten(1))


def test_statistics_are_taken_anew_from_the_images_whatever_they_were():
    images = TRAIN.tensors[0].double()
    data = TensorDataset(images, torch.full((40,), -1.5))  # labels play no part
    model = with_dropout().double()
    model[1].running_mean.fill_(float("nan"))
    refresh_batch_norms(model, data, batch_size=40)
    with torch.no_grad():
        maps = model[0](images)
    assert_close(model[1].running_mean, maps.mean((0, 2, 3)))  # float64: rounding only
    assert_close(model[1].running_var, maps.var((0, 2, 3)))
    once = copy.deepcopy(model.state_dict())
    refresh_batch_norms(model, data, batch_size=40)
    assert_same(dict(model.state_dict()), dict(once))


def test_statistics_are_the_mean_over_whole_mini_batches_of_a_random_part():
    seen = []
    model = network()
    model[1].register_forward_hook(lambda norm, inputs, output: seen.append(inputs[0].clone()))
    by_class = TensorDataset(*(tensor[TRAIN.tensors[1].argsort()] for tensor in TRAIN.tensors))
    refresh_batch_norms(model, by_class, batch_size=7, images=20)
    assert [len(maps) for maps in seen] == [7, 7]
    expected = torch.stack([maps.mean((0, 2, 3)) for maps in seen]).mean(0)
    assert_close(model[1].running_mean, expected)
    with torch.no_grad():
        first = model[0](by_class.tensors[0][:14])
    assert not torch.isclose(torch.cat(seen).mean(), first.mean())


@pytest.mark.parametrize("interrupted", [False, True])
def test_only_the_statistics_change(interrupted):
    def stop(*_):
        raise KeyboardInterrupt

    model = with_dropout()
    model[1].momentum = 0.3
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    if interrupted:
        handle = model[-1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            refresh_batch_norms(model, Pairs(TRAIN))
        handle.remove()
    else:
        refresh_batch_norms(model, Pairs(TRAIN))
        assert model[1].num_batches_tracked == 1
    after = state_of(model)
    changed = () if interrupted else ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    for name in changed:
        assert not torch.equal(after["values"].pop(name), before["values"].pop(name))
    assert_same(after, before)
    assert model[1].momentum == 0.3


def test_images_that_the_network_cannot_take_leave_the_statistics():
    model, other = network(), TensorDataset(torch.ones(9, 1, 5, 5), torch.zeros(9).long())
    before = state_of(model)
    with pytest.raises(ValueError, match="can't take a batch"):
        refresh_batch_norms(model, other)
    for wrong in ({"images": 0}, {"batch_size": 0}, {"data": EMPTY}):
        with pytest.raises(ValueError, match=r"images|batch_size|empty"):
            refresh_batch_norms(model, **{"data": TRAIN, **wrong})
    assert_same(state_of(model), before)


def test_frozen_statistics_stay_and_those_after_them_are_taken_anew():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    model[0].requires_grad_(False).eval()
    refresh_batch_norms(model, TRAIN)
    assert (model[0].running_mean == 0).all() and (model[1].running_mean != 0).all()
    assert not model[0].training and model[1].training


def test_a_network_of_several_inputs_has_its_statistics_taken_anew():
    images, labels = TRAIN.tensors
    model = TwoInputs()
    pairs = [((x, 2 * x), y) for x, y in zip(images, labels, strict=True)]
    refresh_batch_norms(model, pairs)
    assert_close(model.norm.running_mean, (3 * images).mean((0, 2, 3)))


def test_a_network_without_batch_norms_is_not_run():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 2), nn.BatchNorm1d(2, track_running_stats=False)
    )
    model.forward = lambda x: pytest.fail("it was run")
    before = state_of(model)
    refresh_batch_norms(model, TRAIN)
    assert_same(state_of(model), before)
