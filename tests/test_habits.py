"""What users' networks do beyond layer after layer, against plain computations by hand."""

import copy
import warnings

import pytest
import torch
from networks import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import TaylorPruner, evaluate, filter_scores, mask_filters, remove_filters
from cnn_pruning.experiments.training import refresh_batch_norms
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, filter_costs
from cnn_pruning.network.reading import _half_of_each
from cnn_pruning.oracle import oracle


class Net(nn.Module):
    """Layers by name, and a forward that is a function of (network, inputs)."""

    def __init__(self, way, **layers: nn.Module):
        super().__init__()
        self.way = way
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.way(self, *inputs)


def built(way, dtype=torch.float64, **layers):
    torch.manual_seed(0)
    model = Net(way, **{name: make() for name, make in layers.items()})
    for value in model.parameters():
        nn.init.normal_(value, std=0.4)
    return model.to(dtype).eval()


def examples(shape, size=6, dtype=torch.float64):
    images = torch.randn(size, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, torch.arange(size) % 3)


def by_masks(model, data, name, filters):
    with torch.no_grad():
        base, _ = evaluate(model, data)
        losses = []
        for k in range(filters):
            with mask_filters(model, {name: [k]}, data):
                losses.append(evaluate(model, data)[0] - base)
    return torch.tensor(losses, dtype=torch.float64)


# The oracle's short way, where the outputs aren't the last layer's any more


def set_in_place(y):
    y[:, 2] = -5
    return y


IN_PLACE = {
    "a temperature": lambda y: y.div_(0.1),
    "a learned scale": lambda y: y.mul_(torch.tensor(2.0).exp()),
    "clamp": lambda y: y.clamp_(-0.1, 0.1),
    "a class that is masked": set_in_place,
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_the_oracle_sees_what_is_done_in_place_behind_the_last_layer(change):
    model = built(
        lambda m, x: IN_PLACE[change](m.head(F.relu(m.a(x)).mean((2, 3)))),
        a=lambda: nn.Conv2d(1, 4, 3),
        head=lambda: nn.Linear(4, 3),
    )
    data = examples((1, 8, 8))
    assert_close(oracle(model, data)["a"], by_masks(model, data, "a", 4))


def test_the_oracle_sees_an_activation_in_place_at_the_end_of_a_sequence():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
        nn.Hardtanh(-0.1, 0.1, inplace=True),
    ).double()
    data = examples((1, 8, 8))
    assert_close(oracle(model, data)["0"], by_masks(model, data, "0", 4))


def test_the_oracle_sees_that_the_last_layers_input_was_changed_since():
    def way(m, x):
        z = F.relu(m.a(x)).mean((2, 3))
        y = m.head(z)
        z.zero_()
        return y

    model = built(way, a=lambda: nn.Conv2d(1, 4, 3), head=lambda: nn.Linear(4, 3))
    data = examples((1, 8, 8))
    assert_close(oracle(model, data)["a"], by_masks(model, data, "a", 4))


# Sequences


def over_time(m, x):
    z = F.relu(m.a(x)).flatten(2)  # (N, 8, T)
    z = z.transpose(1, 2) if m.block.self_attn.batch_first else z.permute(2, 0, 1)
    z = m.block(z)
    return m.head(z.mean(1 if m.block.self_attn.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("size", [16, 32])
def test_time_steps_do_not_pass_for_examples(batch_first, size):
    """Sixteen steps: as many as there are examples in one of the cases."""
    model = built(
        over_time,
        a=lambda: nn.Conv2d(1, 8, 3, padding=1),
        block=lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first),
        head=lambda: nn.Linear(8, 3),
    )
    data = examples((1, 4, 4), size)
    if batch_first:
        assert len(filter_scores(model, data, linear=True)["block.linear1"]) == 12
        return
    with pytest.raises(TypeError, match="puts out 16 feature maps for 2 examples"):
        filter_scores(model, data, linear=True)
    options = {"filters": 8, "updates": 1, "linear": True, "batch_size": 16}
    with pytest.raises(TypeError, match="puts out 16 feature maps for 2 examples"):
        next(prune_iteratively(model, data, data, **options))
    assert len(filter_scores(model, data, "weight", linear=True)["block.linear1"]) == 12


CROPS = {
    "[..., -L:]": lambda z, y: z[..., -y.shape[-1] :],
    "[:, :, 1:]": lambda z, y: z[:, :, 1:],
    "[..., :-1]": lambda z, y: z[..., :-1],
    "narrow": lambda z, y: z.narrow(2, 1, y.shape[2]),
}


@pytest.mark.parametrize("crop", CROPS)
def test_a_skip_connection_may_crop_a_sequence(crop):
    """As a WaveNet does, whose convolutions don't pad."""

    def way(m, x):
        z = F.relu(m.a(x))
        y = m.b(z)
        return m.head(F.relu(m.c(y + CROPS[crop](z, y))).mean(2))

    model = built(
        way,
        a=lambda: nn.Conv1d(1, 5, 1),
        b=lambda: nn.Conv1d(5, 5, 2),
        c=lambda: nn.Conv1d(5, 4, 1),
        head=lambda: nn.Linear(4, 3),
    )
    data = examples((1, 12))
    assert {n: len(v) for n, v in filter_scores(model, data).items()} == {"a": 5, "c": 4}
    filters = {"a": [1, 4], "c": [2]}
    small = remove_filters(model, filters, data)
    longer = torch.randn(3, 1, 20, dtype=torch.float64)
    with mask_filters(model, filters, data):
        assert_close(small(longer), model(longer))
    assert small.a.out_channels == small.b.out_channels == small.b.in_channels == 3


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_halves_of_the_channels_that_slices_take_go_together(kind, sign):
    """Max-feature-map: the larger of two maps, filter k with filter k + 4."""

    def way(m, x):
        z = m.a(x)
        half = z.shape[1] // 2
        z = F.relu(m.b(torch.maximum(z[:, :half], z[:, sign * half :])))
        return m.head(z.flatten(2).mean(2))

    model = built(
        way,
        a=lambda: kind(1, 8, 1),
        b=lambda: kind(4, 5, 1),
        head=lambda: nn.Linear(5, 3),
    )
    data = examples((1, 12) if kind is nn.Conv1d else (1, 6, 6))
    scores = filter_scores(model, data)
    assert {name: len(values) for name, values in scores.items()} == {"a": 4, "b": 5}
    with mask_filters(model, {"a": [1, 2]}, data):
        masked = model(data.tensors[0])
    small = remove_filters(model, {"a": [1, 2]}, data)
    assert_close(small(data.tensors[0]), masked)
    assert_close(small.a.weight, model.a.weight[[0, 3, 4, 7]])


# Conditions


def conditioned(first):
    """FiLM: a linear layer of a second input scales and shifts the maps of a convolution."""

    def way(m, x, t):
        if first == "condition":
            shift = m.condition(t)
            z = m.a(x)
        else:
            z = m.a(x)
            shift = m.condition(t)
        return m.head(F.relu(m.b(F.relu(z + shift[:, :, None, None]))).mean((2, 3)))

    return built(
        way,
        a=lambda: nn.Conv2d(1, 8, 3),
        condition=lambda: nn.Linear(6, 8),
        b=lambda: nn.Conv2d(8, 5, 3),
        head=lambda: nn.Linear(5, 3),
    )


class Pairs(Dataset):
    def __init__(self, images, second, labels):
        self.rows = list(zip(images, second, labels.tolist(), strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image, second, label = self.rows[i]
        return (image, second), label


@pytest.mark.parametrize("first", ["condition", "convolution"])
def test_a_group_has_the_name_of_its_convolution_whatever_is_called_first(first):
    model, data = conditioned(first), examples((1, 8, 8))
    pairs = Pairs(data.tensors[0], torch.randn(6, 6).double(), data.tensors[1])
    found = filter_scores(model, pairs)
    assert {name: len(values) for name, values in found.items()} == {"a": 8, "b": 5}
    assert_close(found, filter_scores(conditioned("convolution"), pairs))
    small = remove_filters(model, {"a": [0, 3]}, pairs)
    assert small.condition.out_features == 6


def stepped():
    """A diffusion network's habit: an integer for each image, a time step, becomes a vector."""
    return built(
        lambda m, x, t: m.head(F.relu(m.a(x) + m.steps(t)[:, :, None, None]).mean((2, 3))),
        a=lambda: nn.Conv2d(1, 6, 3),
        steps=lambda: nn.Linear(1, 6),
        head=lambda: nn.Linear(6, 3),
    )


def test_an_input_of_one_number_for_each_image_can_be_counted():
    model, data = stepped(), examples((1, 8, 8))
    model.way = lambda m, x, t: m.head(
        F.relu(m.a(x) + m.steps(t[:, None].double())[:, :, None, None]).mean((2, 3))
    )
    steps = Pairs(data.tensors[0], torch.arange(6), data.tensors[1])
    each = 36 * 9 + 1 + 3  # of one filter: the convolution, the time step, the head
    assert [row["macs"] for row in filter_costs(model, steps)] == [each]
    pruner = TaylorPruner(model)
    pruner.score(steps)
    assert len(pruner.select(macs=0.5)["a"]) == 3
    (step,) = prune_iteratively(model, steps, steps, filters=5, updates=1, batch_size=6)
    assert step.macs == 5 * each


# What isn't reached


def test_a_convolution_that_forward_uses_as_a_function_is_named():
    model = built(
        lambda m, x: m.head(F.relu(m.b(F.conv2d(x, m.a.weight, m.a.bias))).mean((2, 3))),
        a=lambda: nn.Conv2d(1, 4, 3),
        b=lambda: nn.Conv2d(4, 5, 3),
        head=lambda: nn.Linear(5, 3),
    )
    with pytest.warns(UserWarning, match="a .forward doesn't call it as a layer"):
        assert list(filter_scores(model, examples((1, 8, 8)))) == ["b"]
    with pytest.raises(TypeError, match="a can't lose filters: forward doesn't call it"):
        remove_filters(model, {"a": [0]}, examples((1, 8, 8)))


def test_batch_norms_that_no_image_reaches_keep_their_statistics():
    model = built(
        lambda m, x: m.head(F.relu(m.norms[0](m.a(x))).mean((2, 3))),
        a=lambda: nn.Conv2d(1, 4, 3),
        norms=lambda: nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]),  # one a domain
        head=lambda: nn.Linear(4, 3),
    )
    for norm in model.norms:
        norm(torch.randn(9, 4, 3, 3, dtype=torch.float64) * 3)
        norm.train()(torch.randn(9, 4, 3, 3, dtype=torch.float64) * 3)
    reached, other = (copy.deepcopy(norm.state_dict()) for norm in model.norms)
    refresh_batch_norms(model, examples((1, 8, 8)))
    assert_same(dict(model.norms[1].state_dict()), dict(other))
    assert not torch.equal(model.norms[0].running_mean, reached["running_mean"])


def test_keep_may_name_a_linear_layer_whether_or_not_those_are_scored():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.ReLU()),
        nn.Linear(5, 3),
    ).double()
    data = examples((1, 8, 8))
    for linear in (False, True):
        assert list(filter_scores(model, data, keep=["3"], linear=linear)) == ["0"]
        pruner = TaylorPruner(model, keep=["3"], linear=linear)
        pruner.score(data)
        assert len(pruner.select(3)["0"]) == 3
        options = {"keep": ["3"], "linear": linear, "updates": 0, "per_step": 3}
        step = next(prune_iteratively(model, data, data, parameters=300, **options))
        assert len(step.removed["0"]) == 3


@pytest.mark.parametrize("per_step", [1, 2, 4, 10])
def test_a_step_takes_no_more_than_the_layers_that_rescore_returns_can_lose(per_step):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 20, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(320, 3)),
    ).double()
    data, taken = examples((1, 8, 8)), ["0", "2"]

    def rescore(network, scores):
        return {name: scores[name] for name in taken}

    options = {"filters": 4, "updates": 0, "per_step": per_step, "rescore": rescore}
    steps = prune_iteratively(model, data, data, **options)
    next(steps)
    taken.remove("2")  # only the first layer is left, which has two to lose at most
    widths = []
    with pytest.raises(ValueError, match="Can't remove 1 filters"):  # and at last none
        for step in steps:
            widths.append(step.model[0].out_channels)
    assert widths[-1:] in ([1], [])


# Counting, and odd weights


def test_recurrent_layers_are_counted_by_whatever_name_and_packing_they_take():
    lstm = nn.LSTM(4, 5, batch_first=True)
    whole = 7 * (4 * 5 * 4 + 4 * 5 * 5)
    named = Net(lambda m, x: m.r(input=x)[0], r=lstm)
    packed = Net(lambda m, x: m.r(pack_padded_sequence(x, [7], batch_first=True))[0].data, r=lstm)
    for model in (named, packed):
        assert count_macs(model, torch.rand(1, 7, 4)) == whole


def test_complex_weights_are_left_as_they_are():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex128))

        def forward(self, x):
            return torch.fft.irfft2(torch.fft.rfft2(x) * self.weight[:, :1, None], s=x.shape[2:])

    model = built(
        lambda m, x: m.head(F.relu(m.b(m.mix(F.relu(m.a(x))))).mean((2, 3))),
        a=lambda: nn.Conv2d(1, 4, 3),
        b=lambda: nn.Conv2d(4, 5, 3),
        head=lambda: nn.Linear(5, 3),
    )
    model.add_module("mix", Spectral())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "b" in filter_scores(model, examples((1, 8, 8)))


@pytest.mark.parametrize("count", range(3, 9))
def test_in_the_trial_two_groups_of_one_size_lose_other_filters(count):
    one, other = _half_of_each({"a": count, "b": count}).values()
    assert one != other
    for half in (one, other):
        assert half[0] == 0 and half[-1] < count - 1 and len(set(half)) == len(half)
