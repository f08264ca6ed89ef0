"""Networks with branches, against a second way: gates, sums and removals written out by hand.

Everything is float64. Two ways that make the same sums in another order differ by some hundred
times 1e-16 of the terms, which are near 1, so what ``assert_close`` allows here (1e-8 of a value,
or 1e-12) leaves room for rounding only. Where it's another tolerance, a comment says why.
"""

import builtins
import copy
import itertools
import math
import random
import re
import threading
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from networks import PROPERTY, SEEDS, assert_same, state_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from torchvision.ops.misc import FrozenBatchNorm2d

from cnn_pruning import (
    TaylorPruner,
    evaluate,
    filter_scores,
    fit,
    mask_filters,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.criteria import CRITERIA
from cnn_pruning.feature_maps import scorable
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, filter_costs

assert_close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)


def no_gate(group, z):
    return z


def norm(width):
    """A batch norm that changes its maps in evaluation mode, too."""
    layer = nn.BatchNorm2d(width)
    layer.running_mean.normal_(0, 0.3)
    layer.running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias, 0, 0.3)
    return layer


def normed(conv):
    return nn.Sequential(conv, norm(conv.out_channels))


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class ResNet(nn.Module):
    """An identity shortcut, and one that downsamples; all with batch norm.

    In these networks, ``gate(group, z)`` stands where a tensor goes into layers that mix channels,
    and ``groups`` has the layers that make each group's maps; the groups are in the order of use.
    """

    def __init__(self, width=2):
        super().__init__()
        self.groups = {
            "stem.0": ["stem.0", "b.0"],
            "a.0": ["a.0"],
            "c.0": ["c.0"],
            "d.0": ["d.0", "e.0"],
        }
        w, inner, wider = width, width + 1, width + 1
        self.stem = normed(conv(1, w, bias=False))
        self.a, self.b = normed(conv(w, inner, bias=False)), normed(conv(inner, w, bias=False))
        self.c = normed(conv(w, w, stride=2))
        self.d, self.e = normed(conv(w, wider)), normed(conv(w, wider, 1, bias=False))
        self.head = nn.Linear(wider, 3)

    def forward(self, x, gate=no_gate):
        x = F.relu(self.stem(x))
        inner = F.silu(self.a(gate("stem.0", x)))
        x = F.relu(x + self.b(gate("a.0", inner)))
        x = F.max_pool2d(gate("stem.0", x), 2)  # into c and e: one tensor, so one map
        inner = F.silu(self.c(x))
        x = F.relu(self.d(gate("c.0", inner)) + self.e(x)[:, :, ::2, ::2])
        return self.head(F.adaptive_avg_pool2d(gate("d.0", x), 1).flatten(1))


class UNet(nn.Module):
    """Two levels: upsampling and concatenation, a transposed convolution and concatenation."""

    def __init__(self, width=2):
        super().__init__()
        self.groups = {name: [name] for name in ("one.0", "two", "mid", "dec", "up", "last")}
        w = width
        self.one = normed(conv(1, w))
        self.two, self.mid = conv(w, w + 1, 1), conv(w + 1, w, 1)
        self.dec = conv(2 * w + 1, w, 1, bias=False)
        self.up = nn.ConvTranspose2d(w, w + 1, 2, 2)
        self.last = conv(2 * w + 1, w)
        self.out = conv(w, 3, 1)

    def forward(self, x, gate=no_gate):
        one = F.silu(self.one(x))
        two = torch.sigmoid(self.two(F.max_pool2d(gate("one.0", one), 2)))
        mid = F.silu(self.mid(F.avg_pool2d(gate("two", two), 2)))
        mid = F.interpolate(mid, scale_factor=2)
        x = F.silu(self.dec(torch.cat([gate("mid", mid), gate("two", two)], 1)))
        x = F.leaky_relu(self.up(gate("dec", x)))
        x = F.silu(self.last(torch.cat([gate("up", x), gate("one.0", one)], 1)))
        x = F.interpolate(gate("last", x), scale_factor=2, mode="bilinear")
        return self.out(x).mean((2, 3))


class MobileNet(nn.Module):
    """An inverted residual: a depthwise convolution, squeeze and excitation, an addition."""

    def __init__(self, width=2):
        super().__init__()
        self.groups = {
            "stem.0": ["stem.0", "project.0"],
            "expand.0": ["expand.0", "depthwise.0", "excite"],
            "squeeze": ["squeeze"],
            "last": ["last"],
        }
        w, wide = width, 2 * width
        self.stem = normed(conv(1, w, stride=2, bias=False))
        self.expand = normed(conv(w, wide, 1, bias=False))
        self.depthwise = normed(conv(wide, wide, groups=wide, bias=False))
        self.squeeze, self.excite = conv(wide, w, 1), conv(w, wide, 1)
        self.project = normed(conv(wide, w, 1, bias=False))
        self.last = conv(w, wide, 1)
        self.head = nn.Linear(wide, 3)

    def forward(self, x, gate=no_gate):
        x = F.hardswish(self.stem(x))
        inner = F.hardswish(self.expand(gate("stem.0", x)))
        inner = F.silu(self.depthwise(inner))
        scale = F.elu(self.squeeze(gate("expand.0", inner).mean((2, 3), keepdim=True)))
        scale = torch.sigmoid(self.excite(gate("squeeze", scale)))
        x = x + self.project(gate("expand.0", inner * scale))
        x = F.silu(self.last(gate("stem.0", x)))
        return self.head(gate("last", x).mean((2, 3)))


KINDS = [ResNet, UNet, MobileNet]


def network(kind, width=2, seed=2):
    torch.manual_seed(seed)
    model = kind(width).double().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                layer.weight.mul_(2)  # so that filters matter
    return model


def images_and_labels(size=5, shape=(1, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *shape, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.randint(3, (size,), generator=generator))


def cross_entropy(outputs, labels):
    """Of each example; written out."""
    return outputs.logsumexp(1) - outputs.gather(1, labels[:, None])[:, 0]


def maps_and_slopes(model, data, cost=cross_entropy):
    """Each group's maps and their gradients, each (N, K, M): what passes the gates by hand."""
    *inputs, labels = data.tensors
    found = {name: [] for name in model.groups}

    def keep(group, z):
        z = z * 1  # its own gradient: without what comes back past the gate
        found[group].append(z)
        return z

    loss = cost(model(*inputs, gate=keep), labels).sum()
    flat = [z for maps in found.values() for z in maps]
    slopes = dict(zip(map(id, flat), torch.autograd.grad(loss, flat), strict=True))
    return {
        name: (
            torch.cat([z.detach().flatten(2) for z in maps], 2),
            torch.cat([slopes[id(z)].flatten(2) for z in maps], 2),
        )
        for name, maps in found.items()
    }


def closed(filters):
    """A gate that sets the maps of ``filters`` to zero."""

    def gate(group, z):
        z = z.clone()
        z[:, filters.get(group, [])] = 0
        return z

    return gate


def filters_of(layer):
    """The weights of a layer, one row for each filter; a transposed one has them on axis 1."""
    weight = layer.weight.detach()
    return weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight


def widths(model):
    return {name: len(filters_of(model.get_submodule(name))) for name in model.groups}


def some_filters(model, seed):
    rng = random.Random(seed)
    return {
        n: sorted(rng.sample(range(k), rng.randint(0, k - 1))) for n, k in widths(model).items()
    }


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# 1. Every criterion, by hand

BY_HAND = {
    "taylor": lambda z, g: (z * g).mean(2).abs().mean(0),
    "taylor_abs_first": lambda z, g: (z * g).abs().mean((0, 2)),
    "taylor_abs_last": lambda z, g: (z * g).mean((0, 2)).abs(),
    "taylor_squared": lambda z, g: (z * g).sum(2).square().mean(0),
    "activation_mean": lambda z, g: z.mean((0, 2)),
    "activation_std": lambda z, g: z.transpose(0, 1).flatten(1).std(1, correction=0),
    "apoz": lambda z, g: (z > 0).double().mean((0, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", BY_HAND)
def test_a_criterion_over_maps_is_its_formula_over_all_maps_of_a_group(criterion, kind):
    model, data = network(kind), images_and_labels()
    expected = {n: BY_HAND[criterion](*maps) for n, maps in maps_and_slopes(model, data).items()}
    scores = filter_scores(model, data, criterion, batch_size=2)
    assert list(scores) == list(model.groups)
    # A standard deviation is the root of a difference of squares, and loses digits near 0.
    assert_close(scores, expected, rtol=1e-6 if criterion == "activation_std" else 1e-8)
    assert all(values.any() for values in scores.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_is_given_the_maps_of_a_group_side_by_side(kind):
    model, data = network(kind), images_and_labels()
    given = []

    def criterion(z, slope):
        assert not z.requires_grad and not slope.requires_grad
        given.append((z, slope))
        return z.amax(2) - slope.amin(2)

    scores = filter_scores(model, data, criterion)
    for (name, (z, slope)), seen in zip(maps_and_slopes(model, data).items(), given, strict=True):
        assert_close(seen, (z, slope))
        assert_close(scores[name], (z.amax(2) - slope.amin(2)).mean(0))


def information(left, right):
    pairs, size = list(zip(left, right, strict=True)), len(left)
    return sum(
        count / size * math.log(size * count / (left.count(a) * right.count(b)))
        for (a, b), count in Counter(pairs).items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mutual_information_is_that_of_the_ranks_of_a_group_s_means_and_the_labels(kind):
    model, data = network(kind), images_and_labels(40)
    scores = filter_scores(model, data, "mutual_information", batch_size=7)
    for name, (z, _) in maps_and_slopes(model, data).items():
        expected = []
        for means in z.mean(2).T.tolist():
            edges = [sorted(means)[int(i / 10 * 39)] for i in range(1, 10)]
            tenths = [sum(value > edge for edge in edges) for value in means]
            expected.append(information(tenths, data.tensors[1].tolist()))
        assert_close(scores[name], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_minimum_weight_is_the_mean_square_over_all_layers_that_make_the_maps(kind):
    model = network(kind)
    scores = filter_scores(model, images_and_labels(), "weight")
    for name, layers in model.groups.items():
        for k, score in enumerate(scores[name]):
            weights = [w for n in layers for w in filters_of(model.get_submodule(n))[k].flatten()]
            assert_close(score, mean(w**2 for w in weights))


def diagonal_of_hessian(loss, parameters):
    """The second derivative of ``loss`` by each value of the parameters alone."""
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    diagonal = []
    for p, slope in zip(parameters, slopes, strict=True):
        rows = [torch.autograd.grad(s, p, retain_graph=True)[0] for s in slope.flatten()]
        values = [row.flatten()[i] for i, row in enumerate(rows)]
        diagonal.append(torch.stack(values).reshape(p.shape))
    return diagonal


@pytest.mark.parametrize("kind, width", [(ResNet, 1), (UNet, 1), (MobileNet, 2)])
def test_obd_is_the_diagonal_of_the_hessian_in_the_mean_over_all_signs(kind, width, monkeypatch):
    """The signs v are drawn; here they are rows of a Hadamard matrix, over which the mean of
    v_i v_j is exactly 0 for i other than j, so that the mean of v Hv is the diagonal itself."""
    model, data = network(kind, width), images_and_labels(3)
    images, labels = data.tensors
    layers = [model.get_submodule(n) for names in model.groups.values() for n in names]
    parameters = [p for layer in layers for p in layer.parameters()]
    number = sum(p.numel() for p in parameters)
    loss = cross_entropy(model(images), labels).mean()
    diagonal = dict(zip(parameters, diagonal_of_hessian(loss, parameters), strict=True))
    expected = {}
    for name, names in model.groups.items():
        totals = torch.zeros(widths(model)[name], dtype=torch.float64)
        for layer in map(model.get_submodule, names):
            for p in layer.parameters():
                values = p.detach().square() * diagonal[p] / 2
                if p.dim() > 1 and isinstance(layer, nn.ConvTranspose2d):
                    values = values.transpose(0, 1)
                totals += values.flatten(1).sum(1) if p.dim() > 1 else values
        expected[name] = totals

    used = 0

    def signs(high, shape, generator):
        nonlocal used
        places = range(used, used + math.prod(shape))
        used = places.stop
        row = generator.initial_seed()
        return torch.tensor([(row & place).bit_count() % 2 for place in places]).reshape(shape)

    read = scorable(model, data)
    totals, rows = dict.fromkeys(expected, 0.0), 1 << (number - 1).bit_length()
    monkeypatch.setattr(torch, "randint", signs)
    for row in range(rows):
        used = 0
        for name, values in CRITERIA["obd"](read, data, 128, seed=row).items():
            totals[name] = totals[name] + values / rows
        assert used == number
    assert_close(totals, expected)
    assert all((values.abs() > 1e-6).any() for values in expected.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_what_closing_the_gates_of_a_group_does_to_the_loss(kind):
    model, data = network(kind), images_and_labels()
    images, labels = data.tensors
    with torch.no_grad():
        base = cross_entropy(model(images), labels).mean()
        expected = {
            name: torch.stack(
                [
                    cross_entropy(model(images, closed({name: [k]})), labels).mean() - base
                    for k in range(filters)
                ]
            )
            for name, filters in widths(model).items()
        }
    for batch_size in (2, 128):
        scores = filter_scores(model, data, "oracle", batch_size)
        assert_close(scores, expected)
        scores = filter_scores(model, data, "oracle_abs", batch_size)
        assert_close(scores, {n: v.abs() for n, v in expected.items()})
    assert min(v.min() for v in expected.values()) < 0 < max(v.max() for v in expected.values())


@pytest.mark.parametrize("batch_size", [2, 128])
def test_the_oracle_takes_all_values_of_a_filter_from_a_last_linear_layer(batch_size):
    torch.manual_seed(0)
    chain = nn.Sequential(conv(1, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 3))
    chain, data = chain.double(), images_and_labels()
    images, labels = data.tensors
    expected = []
    for gone in ([], [0], [1], [2]):
        maps = chain[:3](images)
        maps[:, gone] = 0
        expected.append(cross_entropy(chain[4](maps.flatten(1)), labels).mean().detach())
    changes = filter_scores(chain, data, "oracle", batch_size)
    assert_close(changes, {"0": torch.stack(expected[1:]) - expected[0]})


@pytest.mark.parametrize("kind", KINDS)
def test_random_scores_are_between_0_and_1_one_for_each_filter(kind):
    model = network(kind)
    scores = filter_scores(model, images_and_labels(), "random")
    assert {name: len(values) for name, values in scores.items()} == widths(model)
    assert all(((values >= 0) & (values < 1)).all() for values in scores.values())


def test_no_criterion_is_forgotten_here():
    others = {"weight", "mutual_information", "obd", "random", "oracle", "oracle_abs"}
    assert set(CRITERIA) == others | set(BY_HAND)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_masked_and_removed_filters_are_closed_gates(kind, seed):
    model, data = network(kind, 3, seed), images_and_labels()
    images, filters = data.tensors[0], some_filters(model, seed)
    expected = model(images, closed(filters))
    with mask_filters(model, filters, data):
        assert_close(model(images), expected)
    small = remove_filters(model, filters, data)
    assert_close(small(images), expected)
    assert widths(small) == {n: k - len(filters[n]) for n, k in widths(model).items()}
    assert (expected - model(images)).abs().max() > 1e-3


# 2. Step by step


def macs_by_hand(model, images):
    """Multiply-adds of one image: each weight of a layer as often as it is used."""
    total, handles = 0, []

    def count(layer, inputs, output):
        nonlocal total
        if isinstance(layer, nn.ConvTranspose2d):
            total += inputs[0][0].numel() * layer.weight[0].numel()
        else:
            total += output[0].numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            handles.append(layer.register_forward_hook(count))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return total


def parameters_by_hand(model):
    return sum(math.prod(p.shape) for p in model.parameters())


def fixed_norms(model):
    """Running statistics that training doesn't move."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    return model


def frozen_norms(model):
    """Running statistics that nothing moves."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("kind, per_step", [(ResNet, 2), (UNet, 3), (MobileNet, 4)])
def test_each_step_is_the_original_with_all_that_went_so_far_masked(kind, per_step, updates):
    """Updates at a rate of 1e-30 change no float64 weight, so this holds with them, too."""
    model, data, val = (
        frozen_norms(network(kind, 3)),
        images_and_labels(6),
        images_and_labels(4, seed=1),
    )
    images, labels = val.tensors
    whole, filters = macs_by_hand(model, images), widths(model)
    gone = {name: [] for name in filters}
    options = {"macs": 0.25, "per_step": per_step, "updates": updates, "lr": 1e-30}
    steps = list(prune_iteratively(model, data, val, **options))
    assert len(steps) > 2
    for step in steps:
        for name, indices in step.removed.items():
            gone[name] += indices
        assert 1 <= sum(map(len, step.removed.values())) <= per_step
        assert step.kept == {n: [k for k in range(filters[n]) if k not in gone[n]] for n in filters}
        assert all(len(set(indices)) == len(indices) for indices in gone.values())
        outputs = model(images, closed(gone)).detach()
        assert_close(step.model(images).detach(), outputs)
        assert step.macs == count_macs(step.model, images) == macs_by_hand(step.model, images)
        assert step.parameters == parameters_by_hand(step.model)
        assert step.filters == sum(map(len, step.kept.values()))
        assert widths(step.model) == {name: len(kept) for name, kept in step.kept.items()}
        assert_close(step.val_loss, cross_entropy(outputs, labels).mean().item())
        assert step.val_accuracy == (outputs.argmax(1) == labels).double().mean().item()
    assert [step.macs <= whole / 4 for step in steps] == [False] * (len(steps) - 1) + [True]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_an_update_are_those_of_its_own_pass_in_training_mode(kind):
    model, data = fixed_norms(network(kind)), images_and_labels(6)
    seen = []

    def rescore(network, scores):
        seen.append(scores)
        return scores

    steps = prune_iteratively(
        model, data, data, filters=1 + len(model.groups), updates=1, lr=1e-30, rescore=rescore
    )
    next(steps)
    model.train()
    for name, maps in maps_and_slopes(model, data).items():
        assert_close(seen[0][name], BY_HAND["taylor"](*maps))
    model.eval()
    moved = maps_and_slopes(model, data)
    if any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        with pytest.raises(AssertionError):
            for name, maps in moved.items():
                assert_close(seen[0][name], BY_HAND["taylor"](*maps))


# 3. Budgets


@pytest.mark.parametrize(
    "kind, name, share",
    [
        *((kind, "macs", 0.5) for kind in KINDS),
        (UNet, "parameters", 1 / 3),
        (MobileNet, "macs", None),
    ],
)
def test_a_budget_is_met_and_one_filter_fewer_would_not_meet_it(kind, name, share):
    model, data = network(kind, 4), images_and_labels()
    images = data.tensors[0]

    def size(model):
        return macs_by_hand(model, images) if name == "macs" else parameters_by_hand(model)

    budget = size(model) * 2 // 3 if share is None else share
    most = budget if share is None else share * size(model)
    pruner = TaylorPruner(model)
    pruner.score(data)
    before = state_of(model)
    filters = pruner.select(**{name: budget})
    count = sum(map(len, filters.values()))
    assert_same(state_of(model), before)
    assert count > 1
    assert filters == pruner.select(count)
    assert size(pruner.prune(count)) <= most < size(pruner.prune(count - 1))
    small = pruner.prune(**{name: budget})
    assert widths(small) == {n: k - len(filters[n]) for n, k in widths(model).items()}
    assert_close(small(images), model(images, closed(filters)))


def test_a_budget_that_is_met_already_removes_nothing():
    model, data = network(MobileNet), images_and_labels()
    pruner = TaylorPruner(model)
    pruner.score(data)
    macs = macs_by_hand(model, data.tensors[0])
    whole = ({"macs": 1.0}, {"parameters": 1.0})
    for budget in ({"milliseconds": 1e6}, {"macs": macs}, {"parameters": 10**9}, *whole):
        assert not any(pruner.select(**budget).values())
        assert_same(pruner.prune(**budget)(data.tensors[0]), model(data.tensors[0]))
    assert sum(map(len, pruner.select(macs=macs - 1).values())) == 1


@pytest.mark.parametrize("budget", [{"macs": 1}, {"parameters": 0.01}, {"milliseconds": 1e-9}])
def test_a_budget_out_of_reach_is_a_value_error_that_says_what_is_left(budget):
    model, data = network(UNet), images_and_labels()
    ((name, _),) = budget.items()
    pruner = TaylorPruner(model)
    pruner.score(data)
    with pytest.raises(
        ValueError, match=rf"^The network can't get down to .* {name}: it .*\d, by keep"
    ):
        pruner.prune(**budget)
    with pytest.raises(
        ValueError, match=rf"^The network can't get down to .* {name}: it .*\d, by keep"
    ):
        next(prune_iteratively(model, data, data, updates=0, **budget))


def test_min_filters_keep_and_max_share_hold_under_a_budget():
    model, data = network(ResNet, 4), images_and_labels()
    free = TaylorPruner(model)
    held = TaylorPruner(model, keep="e.0", min_filters={"c.0": 3}, max_share=0.5)
    free.score(data), held.score(data)
    whole = macs_by_hand(model, data.tensors[0])
    small = widths(held.prune(macs=0.5))
    assert small["d.0"] == 5 and small["c.0"] >= 3 and small["stem.0"] >= 2 and small["a.0"] >= 3
    least = macs_by_hand(held.prune(1 + 2 + 2), data.tensors[0])
    assert sum(map(len, held.select(macs=least).values())) == 1 + 2 + 2
    with pytest.raises(ValueError, match=f"it keeps at least {least:,}"):
        held.prune(macs=least - 1)
    assert macs_by_hand(free.prune(macs=least - 1), data.tensors[0]) < least < whole


@pytest.mark.parametrize(
    "n, budget, message",
    [
        (None, {"macs": 0.5, "parameters": 0.5}, "Name one budget, .*, not macs and parameters"),
        (None, {"speed": 2}, "Name one budget, .*macs, parameters, milliseconds.*not speed"),
        (2, {"macs": 0.5}, "number of filters or a budget, not both"),
        (None, {}, "Name the number of filters or a budget"),
        (None, {"macs": None}, "Name one budget"),
        (None, {"macs": 0}, "macs must be a positive number"),
        (None, {"parameters": -0.5}, "parameters must be a positive number"),
        (None, {"milliseconds": "2"}, "milliseconds must be a positive number"),
        (None, {"macs": math.nan}, "macs must be a positive number"),
    ],
)
def test_a_wrong_budget_is_a_value_error(n, budget, message):
    pruner = TaylorPruner(network(ResNet))
    pruner.score(images_and_labels())
    with pytest.raises(ValueError, match=message):
        pruner.prune(n, **budget)


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"macs": 0.5, "parameters": 0.5}, "Name one budget, .*not parameters and macs"),
        ({"filters": 5, "parameters": 0.5}, "Name one budget, .*not filters and parameters"),
        ({}, "Name one budget"),
    ],
)
def test_a_wrong_budget_for_steps_is_a_value_error(budget, message):
    data = images_and_labels()
    with pytest.raises(ValueError, match=message):
        next(prune_iteratively(network(ResNet), data, data, updates=0, **budget))


# 4. Selection


def of_layer(value, name):
    return value.get(name, 1) if isinstance(value, dict) else value


@PROPERTY
@given(SEEDS)
def test_selected_filters_are_the_lowest_of_all_choices_that_are_allowed(seed):
    """Against a search of every set of filters, with what is rounded up given back afterwards."""
    rng = random.Random(seed)
    for _ in range(15):
        names = "abc"[: rng.randint(1, 3)]
        scores = {name: [rng.randint(-2, 2) for _ in range(rng.randint(1, 4))] for name in names}

        def by_layer(names=names):
            some = rng.sample(names, rng.randint(0, len(names)))
            return rng.choice([rng.randint(1, 3), {name: rng.randint(1, 3) for name in some}])

        least, multiple = by_layer(), by_layer()
        share = rng.choice([0, 0.25, 0.5, 0.75, 1.0])
        keep = rng.sample(names, rng.choice([0, 0, 1]))
        every = [(name, k) for name in names for k in range(len(scores[name]))]
        ranks = {
            entry: rank
            for rank, entry in enumerate(sorted(every, key=lambda e: (scores[e[0]][e[1]], *e)))
        }

        def allowed(chosen, scores=scores, least=least, share=share, keep=keep):
            lost = Counter(name for name, _ in chosen)
            return all(
                name not in keep
                and len(scores[name]) - count >= of_layer(least, name)
                and count <= share * len(scores[name])
                for name, count in lost.items()
            )

        tensors = {name: torch.tensor(values) for name, values in scores.items()}
        for n in range(len(every) + 1):
            choices = [c for c in itertools.combinations(every, n) if allowed(c)]
            options = (least, keep, share, multiple)
            if not choices:
                with pytest.raises(ValueError, match="Can't remove"):
                    select_filters(tensors, n, *options)
                continue
            best = min(choices, key=lambda c: sorted(ranks[entry] for entry in c))
            total = sum(scores[name][k] for name, k in best)
            assert total == min(sum(scores[name][k] for name, k in c) for c in choices)
            expected = {}
            for name in names:
                gone = sorted((e for e in best if e[0] == name), key=ranks.get)
                width = len(scores[name])
                while gone and (width - len(gone)) % of_layer(multiple, name):
                    gone.pop()
                expected[name] = sorted(k for _, k in gone)
            assert select_filters(tensors, n, *options) == expected


@pytest.mark.parametrize(
    "share, filters",
    [
        (0.5, 10),
        (0.7, 90),
        (15 / 22, 22),
    ],
)
def test_a_layer_can_lose_all_filters_of_its_share(share, filters):
    count = round(share * filters)
    assert count / filters == share
    chosen = select_filters({"a": torch.arange(filters)}, count, max_share=share)
    assert chosen == {"a": list(range(count))}


class Grouped(nn.Module):
    """One filter of ``first`` and of ``grouped`` is four channels, one in each of four groups."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = conv(1, 16), conv(16, 32, groups=4)
        self.last, self.head = conv(32, 24), nn.Linear(24, 3)

    def forward(self, x, gate=no_gate):
        def gated(group, x, groups):
            z = x.unflatten(1, (groups, -1)).transpose(1, 2)  # (N, filters, groups, H, W)
            return gate(group, z).transpose(1, 2).flatten(1, 2)

        x = gated("first", F.silu(self.first(x)), 4)
        x = gated("grouped", F.silu(self.grouped(x)), 4)
        return self.head(gate("last", F.silu(self.last(x))).mean((2, 3)))


def test_one_score_stands_for_a_channel_of_each_of_a_convolution_s_groups():
    torch.manual_seed(0)
    model, data = Grouped().double().eval(), images_and_labels()
    model.groups = ["first", "grouped", "last"]
    expected = {n: BY_HAND["taylor"](*maps) for n, maps in maps_and_slopes(model, data).items()}
    assert_close(filter_scores(model, data), expected)
    filters = {"first": [1], "grouped": [0, 5, 6], "last": [3]}
    small = remove_filters(model, filters, data)
    assert_close(small(data.tensors[0]), model(data.tensors[0], closed(filters)))


@pytest.mark.parametrize("multiple", [8, {"first": 8, "grouped": 16}, {"grouped": 6}])
def test_multiples_count_channels_where_a_score_stands_for_several(multiple):
    torch.manual_seed(0)
    model, data = Grouped().double(), images_and_labels()
    pruner = TaylorPruner(model, multiple_of=multiple)
    scores = pruner.score(data)
    assert {name: len(values) for name, values in scores.items()} == {
        "first": 4,
        "grouped": 8,
        "last": 24,
    }
    seen = set()
    for n in range(0, 34, 4):
        small = pruner.prune(n)
        for name, width in (("first", 16), ("grouped", 32), ("last", 24)):
            channels = small.get_submodule(name).out_channels
            assert channels == width or channels % of_layer(multiple, name) == 0
            seen.add((name, channels))
        assert small(data.tensors[0]).shape == (5, 3)
        removed = sum(map(len, pruner.select(n).values()))
        assert removed <= n
    assert len(seen) > 5


def test_a_budget_is_reached_where_only_the_smallest_multiples_keep_it():
    torch.manual_seed(0)
    model, data = Grouped().double(), images_and_labels()
    pruner = TaylorPruner(model, multiple_of=6)  # of 16, 32 and 24 channels
    pruner.score(data)
    smallest = remove_filters(model, pruner.select(33), data)  # one filter of each group stays
    channels = [smallest.get_submodule(name).out_channels for name in ("first", "grouped", "last")]
    assert channels == [12, 12, 6]
    macs = count_macs(smallest, data.tensors[0])
    assert count_macs(pruner.prune(macs=macs), data.tensors[0]) == macs


@pytest.mark.parametrize("per_step", [1, 3, 12])
@pytest.mark.parametrize("multiple", [4, {"first": 8, "grouped": 16}, {"last": 5}])
def test_step_by_step_channels_are_multiples_too(multiple, per_step):
    torch.manual_seed(0)
    model, data = Grouped().double(), images_and_labels()
    options = {"updates": 1, "batch_size": 5, "per_step": per_step, "multiple_of": multiple}
    steps = list(prune_iteratively(model, data, data, macs=0.4, **options))
    for before, step in itertools.pairwise([None, *steps]):
        gone = sum(map(len, step.removed.values()))
        assert gone > 0
        for name, width in (("first", 16), ("grouped", 32), ("last", 24)):
            channels = step.model.get_submodule(name).out_channels
            assert channels == width or channels % of_layer(multiple, name) == 0
        assert before is None or step.macs < before.macs
    assert step.macs <= 0.4 * count_macs(model, data.tensors[0])
    again = remove_filters(model, step.gone, data)
    assert again(data.tensors[0]).shape == (5, 3)


def test_a_step_takes_as_few_more_filters_as_a_multiple_needs():
    torch.manual_seed(0)
    model, data = Grouped().double(), images_and_labels()
    step = next(prune_iteratively(model, data, data, filters=30, updates=0, multiple_of=8))
    scores = normalize(filter_scores(model, data))
    each = {"first": 2, "grouped": 2, "last": 8}  # 8 channels, in filters
    chosen = (select_filters(scores, n, multiple_of=each) for n in itertools.count(1))
    assert step.removed == next(one for one in chosen if any(one.values()))


def test_a_target_below_the_smallest_multiples_is_refused():
    model, data = Grouped().double(), images_and_labels()
    with pytest.raises(ValueError, match="keeps at least 12,"):  # 2 + 2 + 8 filters
        next(prune_iteratively(model, data, data, filters=11, updates=0, multiple_of=8))


# 5. What a filter costs


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_costs_is_what_a_network_without_one_filter_has_less(kind):
    model, data = network(kind), images_and_labels()
    images = data.tensors[0]
    rows = {row["group"]: row for row in filter_costs(model, data)}
    assert list(rows) == list(model.groups)
    for name, filters in widths(model).items():
        row = rows[name]
        assert row["filters"] == row["channels"] == filters
        convs = [n for n in row["layers"] if not isinstance(model.get_submodule(n), nn.BatchNorm2d)]
        assert convs[0] == name and sorted(convs) == sorted(model.groups[name])
        small = remove_filters(model, {name: [filters - 1]}, data)
        assert row["parameters"] == parameters_by_hand(model) - parameters_by_hand(small)
        assert row["macs"] == macs_by_hand(model, images) - macs_by_hand(small, images)


def test_costs_of_a_sequence_without_images_are_refused():
    """A table of zeros would look like filters that cost nothing."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match="size of the network's images must be known"):
        filter_costs(model)
    assert filter_costs(model, torch.rand(2, 1, 8, 8))[0]["macs"] == 36 * 9 + 36 * 3


def test_costs_of_a_residual_network_are_those_of_its_weights():
    """Images of 8x8, and 4x4 behind the pooling; w = 2 filters in the stem, 3 in a, 3 in d."""
    rows = filter_costs(network(ResNet), images_and_labels())
    found = {row["group"]: (row["parameters"], row["macs"]) for row in rows}
    assert found == {
        # the rows of stem and b with their norms; the columns of a, c and e
        "stem.0": ((9 + 2) + (9 * 3 + 2) + 9 * 3 + 9 * 2 + 3, 64 * (9 + 27 + 27) + 4 * 18 + 16 * 3),
        "a.0": ((9 * 2 + 2) + 9 * 2, 64 * 18 + 64 * 18),
        "c.0": ((9 * 2 + 1 + 2) + 9 * 3, 4 * 18 + 4 * 27),
        "d.0": ((9 * 2 + 1 + 2) + (2 + 2) + 3, 4 * 18 + 16 * 2 + 3),
    }


def test_the_multiply_adds_can_be_subtracted_from_the_scores_at_each_step():
    model, data = network(ResNet, 3), images_and_labels()
    images, weight = data.tensors[0], 1e-4
    compared = []

    def rescore(network, scores):
        macs = {row["group"]: row["macs"] for row in filter_costs(network, data)}
        compared.append({name: values - weight * macs[name] for name, values in scores.items()})
        return compared[-1]

    options = {"macs": 0.3, "per_step": 2, "updates": 0, "rescore": rescore}
    now, gone = model, {name: [] for name in widths(model)}
    for step in prune_iteratively(model, data, data, **options):
        slopes = maps_and_slopes(now, data)
        expected, base = {}, macs_by_hand(now, images)
        for name, maps in slopes.items():
            macs = 0
            if widths(now)[name] > 1:
                macs = base - macs_by_hand(remove_filters(now, {name: [0]}, data), images)
            expected[name] = BY_HAND["taylor"](*maps) - weight * macs
        assert_close(compared[-1], expected)
        left = {n: [k for k in range(w) if k not in gone[n]] for n, w in widths(model).items()}
        lowest = sorted(
            (value, name, k)
            for name, values in expected.items()
            for value, k in zip(values.tolist(), left[name], strict=True)
        )
        for _ in range(2):
            _, name, k = next(e for e in lowest if len(left[e[1]]) > 1 and e[2] in left[e[1]])
            left[name].remove(k)
            gone[name].append(k)
        assert step.kept == left
        now = step.model


# 6. Inputs, labels, outputs and costs of other kinds


class Two(nn.Module):
    """A network of two inputs, an image and a vector."""

    def __init__(self):
        super().__init__()
        self.groups = {"a": ["a"], "b": ["b"]}
        self.a, self.b = conv(1, 4), conv(4, 3)
        self.vector, self.head = nn.Linear(2, 4), nn.Linear(7, 3)

    def forward(self, image, vector, gate=no_gate):
        x = F.silu(self.b(gate("a", F.silu(self.a(image)))))
        z = gate("b", x.mean((2, 3))[..., None, None])[..., 0, 0]
        return self.head(torch.cat([z, F.silu(self.vector(vector))], 1))


class Packed(nn.Module):
    """The same network on one tensor that has both."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x[:, :64].reshape(-1, 1, 8, 8), x[:, 64:])


class Pairs(Dataset):
    """((image, vector), label)"""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        *inputs, label = (tensor[i] for tensor in self.tensors)
        return tuple(inputs), label


def two_and_pairs(size=6, seed=0):
    torch.manual_seed(seed)
    images, labels = images_and_labels(size).tensors
    return Two().double().eval(), Pairs(images, torch.randn(size, 2).double(), labels)


def test_a_network_of_two_inputs_is_scored_and_pruned():
    model, data = two_and_pairs()
    *inputs, labels = data.tensors
    for criterion in ("taylor", "activation_mean", "taylor_abs_last"):
        scores = filter_scores(model, data, criterion, batch_size=4)
        assert list(scores) == ["a", "b"]
        for name, maps in maps_and_slopes(model, data).items():
            assert_close(scores[name], BY_HAND[criterion](*maps))
    filters = {"a": [0, 2], "b": [1]}
    expected = model(*inputs, gate=closed(filters))
    for batch in (data, inputs, tuple(inputs)):
        small = remove_filters(model, filters, batch)
        assert_close(small(*inputs), expected)
        with mask_filters(model, filters, batch):
            assert_close(model(*inputs), expected)
    loss, accuracy = evaluate(small, data, batch_size=4)
    assert_close(loss, cross_entropy(expected, labels).mean().item())
    assert accuracy == (expected.argmax(1) == labels).double().mean().item()
    rows = filter_costs(model, data)
    assert [row["macs"] for row in rows] == [64 * 9 + 64 * 27, 64 * 36 + 3]
    base = cross_entropy(model(*inputs), labels).mean()
    for name, changes in filter_scores(model, data, "oracle").items():
        for k, change in enumerate(changes):
            masked = cross_entropy(model(*inputs, gate=closed({name: [k]})), labels).mean()
            assert_close(change, (masked - base).detach())


def test_a_network_of_two_inputs_is_trained_and_pruned_step_by_step():
    model, data = two_and_pairs()
    *inputs, labels = data.tensors
    packed = Packed(copy.deepcopy(model))
    joined = TensorDataset(torch.cat([inputs[0].flatten(1), inputs[1]], 1), labels)
    rows = fit(model, data, data, epochs=2, batch_size=4)
    assert_same(fit(packed, joined, joined, epochs=2, batch_size=4), rows)
    assert_same(packed.inside.state_dict(), model.state_dict())
    steps = list(prune_iteratively(model, data, data, macs=0.5, updates=0, per_step=2))
    gone = {"a": [], "b": []}
    for step in steps:
        gone = {name: gone[name] + step.removed[name] for name in gone}
        assert_close(step.model(*inputs), model(*inputs, gate=closed(gone)))
    assert steps[-1].macs <= 0.5 * count_macs(model, inputs) == 0.5 * (64 * 9 * (4 + 12) + 8 + 21)


class Labelled(Dataset):
    """(image, what ``label`` makes of its class and a weight)"""

    def __init__(self, size, label):
        self.images, self.classes = images_and_labels(size).tensors
        self.weights = torch.linspace(0.5, 2, size, dtype=torch.float64)
        self.label = label
        self.tensors = (self.images, (self.classes, self.weights))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.label(self.classes[i], self.weights[i])


class Label(NamedTuple):
    number: torch.Tensor
    weight: torch.Tensor


def weighted(outputs, label):
    return label[1] * cross_entropy(outputs, label[0])


LABELS = {
    "a tuple": (lambda number, weight: (number, weight), weighted),
    "a named tuple": (Label, lambda y, t: t.weight * cross_entropy(y, t.number)),
    "a dictionary": (
        lambda number, weight: {"number": int(number), "weight": float(weight)},
        lambda y, t: t["weight"] * cross_entropy(y, t["number"]),
    ),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_are_handed_to_the_cost(kind):
    label, cost = LABELS[kind]
    model, data = network(MobileNet), Labelled(6, label)
    expected = maps_and_slopes(model, data, weighted)
    scores = filter_scores(model, data, batch_size=4, cost=cost)
    for name, maps in expected.items():
        assert_close(scores[name], BY_HAND["taylor"](*maps))
    mean_cost = weighted(model(data.images), (data.classes, data.weights)).mean().item()
    loss, accuracy = evaluate(model, data, batch_size=4, cost=cost)
    assert_close(loss, mean_cost)
    assert math.isnan(accuracy)
    step = next(prune_iteratively(model, data, data, filters=4, updates=1, cost=cost))
    removed = {name: indices for name, indices in step.removed.items() if indices}
    assert sum(map(len, removed.values())) == 1 and math.isfinite(step.val_loss)
    rows = fit(model, data, data, epochs=3, batch_size=3, cost=cost)
    assert rows[-1]["val_loss"] < mean_cost
    assert_close(rows[-1]["val_loss"], evaluate(model, data, cost=cost)[0])


class Logits(NamedTuple):
    logits: torch.Tensor
    doubled: torch.Tensor


class Answers(nn.Module):
    def __init__(self, inside, answer):
        super().__init__()
        self.inside, self.answer = inside, answer

    def forward(self, x):
        return self.answer(self.inside(x))


OUTPUTS = {
    "a dictionary": (
        lambda y: {"logits": y, "doubled": [2 * y]},
        lambda y, t: cross_entropy(y["doubled"][0] / 2, t),
    ),
    "a named tuple": (lambda y: Logits(y, 2 * y), lambda y, t: cross_entropy(y.logits, t)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_kind_are_handed_to_the_cost(kind):
    answer, cost = OUTPUTS[kind]
    plain, data = network(ResNet), images_and_labels(6)
    model = Answers(copy.deepcopy(plain), answer)
    for criterion in ("taylor", "oracle"):
        found = filter_scores(model, data, criterion, cost=cost)
        expected = filter_scores(plain, data, criterion)
        assert_close(found, {f"inside.{name}": values for name, values in expected.items()})
    small = remove_filters(model, {"inside.stem.0": [1]}, data)
    expected = plain(data.tensors[0], closed({"stem.0": [1]}))
    assert_close(
        cost(small(data.tensors[0]), data.tensors[1]), cross_entropy(expected, data.tensors[1])
    )
    loss, accuracy = evaluate(model, data, cost=cost)
    assert_close(loss, evaluate(plain, data)[0])
    assert math.isnan(accuracy)
    options = {"filters": 8, "updates": 2, "per_step": 2}
    steps = list(prune_iteratively(model, data, data, cost=cost, **options))
    for step, other in zip(steps, prune_iteratively(plain, data, data, **options), strict=True):
        assert list(step.removed.values()) == list(other.removed.values())
        assert_close(step.val_loss, other.val_loss, rtol=1e-6)  # after updates, that amplify
    rows, others = (fit(m, data, data, 2, cost=c) for m, c in ((model, cost), (plain, None)))
    assert_close([row["val_loss"] for row in rows], [row["val_loss"] for row in others], rtol=1e-6)
    with pytest.raises(ValueError, match=r"must return logits.*or give a cost of your own"):
        filter_scores(model, data)


def test_a_cost_that_is_cross_entropy_changes_nothing():
    kind, data = MobileNet, images_and_labels(7)

    def cost(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none")

    one, other = network(kind), network(kind)
    for criterion in ("taylor", "obd", "oracle"):
        found, expected = (filter_scores(one, data, criterion, cost=c) for c in (cost, None))
        assert_close(found, expected)
    assert_close(evaluate(one, data, cost=cost), evaluate(one, data))
    # Adam divides by a root of squares that may be near 0, so rounding grows with the updates.
    close = partial(assert_close, rtol=1e-6, atol=1e-9)
    options = {"filters": len(one.groups) + 1, "updates": 2, "per_step": 3}
    steps = [list(prune_iteratively(one, data, data, cost=c, **options)) for c in (cost, None)]
    for step, plain in zip(*steps, strict=True):
        assert (step.removed, step.macs) == (plain.removed, plain.macs)
        close((step.val_loss, step.val_accuracy), (plain.val_loss, plain.val_accuracy))
    rows, plain = fit(one, data, data, 2, batch_size=4, cost=cost), fit(other, data, data, 2, 4)
    close(rows, plain)
    close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_by_a_squared_error_are_equation_8_of_that_error(kind):
    model = network(kind)
    images, labels = images_and_labels(6).tensors
    data = TensorDataset(images, torch.randn(6, 3, dtype=torch.float64) + labels[:, None])

    def cost(outputs, targets):
        return (outputs - targets).square().sum(1)

    expected = maps_and_slopes(model, data, cost)
    for criterion in ("taylor", "taylor_abs_last"):
        scores = filter_scores(model, data, criterion, batch_size=4, cost=cost)
        for name, maps in expected.items():
            assert_close(scores[name], BY_HAND[criterion](*maps))
    base = cost(model(images), data.tensors[1]).mean()
    for name, changes in filter_scores(model, data, "oracle", cost=cost).items():
        for k, change in enumerate(changes):
            masked = cost(model(images, closed({name: [k]})), data.tensors[1]).mean()
            assert_close(change, (masked - base).detach())
    assert math.isnan(evaluate(model, data, cost=cost)[1])


# 7. What can be pruned, and what is left out


class Hidden(nn.Module):
    """A convolution, and two linear layers with hidden units, by functions of PyTorch."""

    def __init__(self):
        super().__init__()
        self.groups = {name: [name] for name in ("conv", "fc1", "fc2")}
        self.conv = conv(1, 3)
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(48, 5),
            nn.Linear(5, 4, bias=False),
            nn.Linear(4, 3),
        )

    def forward(self, x, gate=no_gate):
        def unit(name, z):
            return gate(name, z[..., None, None])[..., 0, 0]

        x = F.max_pool2d(gate("conv", F.silu(self.conv(x))), 2).flatten(1)
        x = unit("fc1", torch.sigmoid(self.fc1(x)))
        return self.fc3(unit("fc2", F.silu(self.fc2(x))))

    def chain(self):
        """The same layers as a Sequential, and the names of the groups in it."""
        layers = [self.conv, nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), self.fc1, nn.Sigmoid()]
        names = {"conv": "0", "fc1": "4", "fc2": "6"}
        return nn.Sequential(*layers, self.fc2, nn.Dropout(0.5), nn.SiLU(), self.fc3).eval(), names


@pytest.mark.parametrize("sequential", [False, True])
def test_hidden_units_go_with_linear_and_are_not_there_without(sequential):
    torch.manual_seed(0)
    written, data = Hidden().double().eval(), images_and_labels(6)
    images, labels = data.tensors
    model, names = written, dict(zip(written.groups, written.groups, strict=True))
    if sequential:
        model, names = written.chain()
    for criterion in BY_HAND:
        expected = {
            names[n]: BY_HAND[criterion](*m) for n, m in maps_and_slopes(written, data).items()
        }
        scores = filter_scores(model, data, criterion, batch_size=4, linear=True)
        assert list(scores) == list(names.values())
        assert_close(scores, expected, rtol=1e-6 if criterion == "activation_std" else 1e-8)
        convs = filter_scores(model, data, criterion, batch_size=4)
        assert_close(convs, {names["conv"]: expected[names["conv"]]}, rtol=1e-6)
    weights = filter_scores(model, data, "weight", linear=True)
    for name, score in zip(("conv", "fc1", "fc2"), weights.values(), strict=True):
        layer = written.get_submodule(name)
        assert_close(score, layer.weight.detach().square().flatten(1).mean(1))
    base = cross_entropy(model(images), labels).mean().detach()
    changes = filter_scores(model, data, "oracle", linear=True)
    for name, k in (("conv", 1), ("fc1", 4), ("fc2", 0)):
        masked = cross_entropy(written(images, closed({name: [k]})), labels).mean()
        assert_close(changes[names[name]][k], (masked - base).detach())
    filters = {"conv": [1], "fc1": [0, 3], "fc2": [2]}
    expected = written(images, closed(filters))
    small = remove_filters(model, {names[n]: gone for n, gone in filters.items()}, data)
    assert_close(small(images), expected)
    assert len(filter_costs(model, data)) == 1
    rows = filter_costs(model, data, linear=True)
    assert [row["macs"] for row in rows] == [64 * 9 + 16 * 5, 48 + 4, 5 + 3]
    pruner = TaylorPruner(model, linear=True)
    pruner.score(data)
    assert parameters_by_hand(pruner.prune(parameters=0.5)) <= parameters_by_hand(model) / 2
    steps = list(prune_iteratively(model, data, data, filters=3, updates=0, linear=True))
    assert steps[-1].kept.keys() == set(names.values()) and steps[-1].filters == 3
    steps = list(prune_iteratively(model, data, data, filters=1, updates=0))
    assert steps[-1].kept.keys() == {names["conv"]}


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


class Middle(nn.Module):
    """Two convolutions, and between them what ``how(self, maps)`` makes of the first one's maps."""

    def __init__(self, how, first=4, second=4, **layers):
        super().__init__()
        self.how = how
        self.first, self.second, self.head = conv(1, first), conv(second, 5), nn.Linear(5, 3)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x, gate=no_gate):
        z = gate("first", self.how(self, self.first(x)))
        return self.head(F.silu(self.second(z)).mean((2, 3)))


class Same(nn.BatchNorm2d):
    """A subclass that overrides nothing."""


class Constant(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("values", torch.randn(*shape))

    def forward(self, x):
        return x * self.values


def frozen_norm():
    layer = FrozenBatchNorm2d(4)
    for value in layer.buffers():
        value.uniform_(0.5, 1.5)
    return layer


def randomized(layer):
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return layer


def use(m, z):
    return F.silu(m.layer(z))


def both_halves(m, z):
    z = F.silu(z)
    return torch.cat([z, F.silu(m.cheap(z))], 1)


# What happens to the first one's maps, the other layers, and the channels of the first and of the
# second convolution that go with each of the first one's filters.
FOUR = [[k] for k in range(4)]
REACHED = {
    "a FrozenBatchNorm2d": (use, {"layer": frozen_norm}, FOUR, FOUR),
    "a SyncBatchNorm": (use, {"layer": lambda: randomized(nn.SyncBatchNorm(4))}, FOUR, FOUR),
    "a subclass": (use, {"layer": lambda: randomized(Same(4))}, FOUR, FOUR),
    "an InstanceNorm2d": (
        use,
        {"layer": lambda: randomized(nn.InstanceNorm2d(4, affine=True))},
        *(FOUR, FOUR),
    ),
    "a parameter (1, C, 1, 1)": (
        lambda m, z: F.silu(z * m.scale),
        {"scale": lambda: parameter(1, 4, 1, 1)},
        *(FOUR, FOUR),
    ),
    "a parameter (1, C, H, W)": (
        lambda m, z: F.silu(z + m.places),
        {"places": lambda: parameter(1, 4, 8, 8)},
        *(FOUR, FOUR),
    ),
    "a buffer (1, C, 1, 1)": (use, {"layer": lambda: Constant(1, 4, 1, 1)}, FOUR, FOUR),
    "a buffer (1, C, H, W)": (use, {"layer": lambda: Constant(1, 4, 8, 8)}, FOUR, FOUR),
    "whole groups of a GroupNorm": (
        use,
        {"layer": lambda: randomized(nn.GroupNorm(2, 4))},
        *([[0, 1], [2, 3]], [[0, 1], [2, 3]]),
    ),
    "the larger of two halves": (
        lambda m, z: torch.max(*z.chunk(2, 1)),
        {},
        *([[k, k + 4] for k in range(4)], FOUR),
    ),
    "the halves of a ghost module": (
        both_halves,
        {"cheap": lambda: conv(4, 4, groups=4)},
        *(FOUR, [[k, k + 4] for k in range(4)]),
    ),
}


@pytest.mark.parametrize("way", REACHED)
def test_what_goes_with_a_filter_goes_exactly(way):
    how, layers, channels, columns = REACHED[way]
    torch.manual_seed(0)
    first, second = (sum(map(len, places)) for places in (channels, columns))
    model = Middle(how, first, second, **{name: make() for name, make in layers.items()})
    model, data = model.double().eval(), images_and_labels()
    images = data.tensors[0]
    scores = filter_scores(model, data)

    def close(gone):
        def gate(group, z):
            z = z.clone()
            z[:, [c for k in gone for c in columns[k]]] = 0
            return z

        return gate

    found = []

    def keep(group, z):
        found.append(z * 1)
        return found[0]

    loss = cross_entropy(model(images, keep), data.tensors[1]).sum()
    (slope,) = torch.autograd.grad(loss, found)
    products = (found[0] * slope).mean((2, 3))
    expected = torch.stack([products[:, places].mean(1).abs().mean(0) for places in columns])
    assert list(scores) == ["first", "second"]
    assert_close(scores["first"], expected.detach())
    for gone in ([0], range(1, len(columns))):
        small = remove_filters(model, {"first": gone}, data)
        expected = model(images, close(gone))
        assert_close(small(images), expected)
        with mask_filters(model, {"first": gone}, data):
            assert_close(model(images), expected)
        left = [c for k, places in enumerate(channels) if k not in gone for c in places]
        assert_same(small.first.weight, model.first.weight[sorted(left)])
        left = [c for k, places in enumerate(columns) if k not in gone for c in places]
        assert_same(small.second.weight, model.second.weight[:, sorted(left)])
        assert (expected - model(images)).abs().max() > 1e-4


def test_a_chain_with_a_sync_batch_norm_needs_no_images():
    torch.manual_seed(0)
    layers = [conv(1, 4), randomized(nn.SyncBatchNorm(4)), nn.SiLU(), conv(4, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(192, 3)).double().eval()
    images = images_and_labels().tensors[0]
    small = remove_filters(model, {"0": [1, 2]})
    maps = model[:3](images)
    maps[:, [1, 2]] = 0
    assert_close(small(images), model[3:](maps))
    assert small[1].num_features == len(small[1].running_mean) == 2


class Attended(nn.Module):
    """Maps times one map that is made of them, beside other maps: an attention gate."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.a, self.b, self.psi, self.c = conv(1, 4), conv(4, 3), conv(3, 1), conv(7, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x, gone=()):
        a = F.silu(self.a(x))
        if gone:
            a = a.index_fill(1, torch.tensor(gone), 0)
        b = F.silu(self.b(a))
        maps = torch.cat([self.times(a, torch.sigmoid(self.psi(b))), b], 1)
        return self.head(F.silu(self.c(maps)).mean((2, 3)))


def test_maps_times_one_map_are_read_in_either_order():
    data, found = images_and_labels(), []
    for times in (lambda a, p: a * p, lambda a, p: p * a, lambda a, p: p * (a * p)):
        torch.manual_seed(0)
        model = Attended(times).double().eval()
        found.append(filter_scores(model, data))
        assert list(found[-1]) == ["a", "b", "c"]
        small = remove_filters(model, {"a": [0, 2]}, data)
        assert_close(small(data.tensors[0]), model(data.tensors[0], gone=(0, 2)))
    assert_close(found[0], found[1])


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 3, padding=1)
        self.times, self.head = nn.Parameter(torch.randn(1, 4, 6, 1, 1)), nn.Linear(3, 3)

    def forward(self, x, gone=()):
        a = F.silu(self.a(x) + self.times)
        if gone:
            a = a.index_fill(1, torch.tensor(gone), 0)
        return self.head(F.silu(self.b(a)).mean((2, 3, 4)))


def test_a_parameter_of_a_video_s_maps_loses_channels_and_not_images():
    torch.manual_seed(0)
    model, videos = Video().double().eval(), torch.rand(4, 1, 6, 5, 5).double()
    small = remove_filters(model, {"a": [1]}, videos)
    assert small.times.shape == (1, 3, 6, 1, 1)
    assert_close(small(videos), model(videos, gone=[1]))


def test_every_convolution_whose_filters_stay_is_named():
    torch.manual_seed(0)
    way = (lambda m, z: (z + m.other(z)).flip(1), 4)
    model = Middle(*way, other=conv(4, 4)).double()
    with pytest.warns(UserWarning, match=r"first, other \("):
        scores = filter_scores(model, images_and_labels())
    assert list(scores) == ["second"]


def tied_decoder(m, z):
    return F.conv_transpose2d(F.silu(m.encoder(F.silu(z))), m.encoder.weight, padding=1)


LEFT_OUT = {
    "an autoencoder with tied weights": (
        tied_decoder,
        *(4, {"encoder": lambda: conv(4, 6)}, {"first", "encoder"}, None),
    ),
    "a linear layer with tied weights": (
        lambda m, z: F.linear(m.fc(z.movedim(1, -1)), m.fc.weight.T).movedim(-1, 1),
        *(4, {"fc": lambda: nn.Linear(4, 6)}, {"first", "fc"}, None),
    ),
    "a convolution by its weight": (
        lambda m, z: F.conv2d(z, m.kernel),
        *(4, {"kernel": lambda: parameter(4, 4, 1, 1)}, {"first"}, None),
    ),
    "a fixed order of channels": (
        lambda m, z: z[:, [2, 0, 1, 3]],
        *(4, {}, {"first"}, "index"),
    ),
    "a shift along the channels": (lambda m, z: z.roll(1, 1), 4, {}, {"first"}, "roll"),
    "channels the other way around": (lambda m, z: z.flip(1), 4, {}, {"first"}, "flip"),
    "sums over channels": (lambda m, z: z.cumsum(1), 4, {}, {"first"}, "cumsum"),
    "a norm over channels": (lambda m, z: F.normalize(z, dim=1), 4, {}, {"first"}, "vector_norm"),
    "a norm in a branch of almost no weight": (
        lambda m, z: z + m.scale * F.normalize(z, dim=1),
        *(4, {"scale": lambda: nn.Parameter(1e-9 * (1 + torch.rand(4, 1, 1)))}, {"first"}, "norm"),
    ),
    "the largest channel": (
        lambda m, z: z * torch.sigmoid(z.amax(1, keepdim=True)),
        *(4, {}, {"first"}, "amax"),
    ),
    "a shuffle": (lambda m, z: F.channel_shuffle(z, 2), 4, {}, {"first"}, "channel_shuffle"),
    "a layer norm": (
        lambda m, z: m.norm(z.movedim(1, -1)).movedim(-1, 1),
        *(4, {"norm": lambda: nn.LayerNorm(4)}, {"first"}, "norm is a LayerNorm"),
    ),
    "gated halves": (lambda m, z: F.glu(z, 1), 8, {}, {"first"}, "glu"),
    "halves of a fixed width": (
        lambda m, z: torch.maximum(*z.split(4, 1)),
        *(8, {}, {"first"}, "split"),
    ),
}


@pytest.mark.parametrize("way", LEFT_OUT)
def test_what_cannot_go_is_left_out_with_its_name_and_never_wrong(way):
    """Each of these can be told apart: the others go exactly, and the left out are refused."""
    how, first, layers, names, why = LEFT_OUT[way]
    torch.manual_seed(0)
    model = Middle(how, first, **{name: make() for name, make in layers.items()})
    model, data = model.double().eval(), images_and_labels()
    with pytest.warns(UserWarning, match="^Left out, because they can't go: ") as caught:
        scores = filter_scores(model, data, linear=True)
    assert list(scores) == ["second"]
    (message,) = {str(w.message) for w in caught}
    for name in names:
        assert re.search(rf"\b{re.escape(name)}\b.* \(", message)
        with pytest.raises(TypeError, match=f"^{name} can't lose (these )?filters: ") as refused:
            remove_filters(model, {name: [0]}, data)
        assert (why or "") in message and (why or "") in str(refused.value)
    small = remove_filters(model, {"second": [0, 2]}, data)
    with mask_filters(model, {"second": [0, 2]}, data):
        assert_close(small(data.tensors[0]), model(data.tensors[0]))


class Disguised(nn.Module):
    """A network, with something before or behind it that could hide what goes wrong inside."""

    def __init__(self, inside, before=lambda x: x, behind=lambda y: y):
        super().__init__()
        self.inside, self.before, self.behind = inside, before, behind

    def forward(self, x):
        return self.behind(self.inside(self.before(x)))


IMPOSSIBLE = torch.tensor([False, False, True])  # a class
DISGUISES = {
    "none": {},
    "a class at -1e9": {"behind": lambda y: y.masked_fill(IMPOSSIBLE, -1e9)},
    "a class far below the others": {"behind": lambda y: y - 1e9 * IMPOSSIBLE},
    "a class at -inf": {"behind": lambda y: y.masked_fill(IMPOSSIBLE, -math.inf)},
    "images in float32": {"before": lambda x: x.float()},
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_nothing_around_a_network_hides_that_a_removal_is_not_exact(disguise):
    """Local response norm changes each value by 1e-5 only, which float32 alone would not tell."""
    torch.manual_seed(0)
    inside = Middle(lambda m, z: F.local_response_norm(3 * F.silu(z), 5), 8, 8)
    model = Disguised(inside, **DISGUISES[disguise])
    data = TensorDataset(torch.randn(5, 1, 8, 8), torch.randint(2, (5,)))
    with pytest.warns(UserWarning, match=r"can't go: inside\.first \("):
        assert list(filter_scores(model, data)) == ["inside.second"]
    with pytest.raises(TypeError, match=r"^inside\.first can't lose these filters: "):
        remove_filters(model, {"inside.first": [0, 3]}, data)


def unpooled(m, z):
    z, places = F.max_pool2d(F.silu(z), 2, return_indices=True)
    return F.max_unpool2d(m.other(z), places, 2)


@pytest.mark.parametrize(
    "how",
    [unpooled, lambda m, z: F.silu(z) * torch.sigmoid(m.other(z)).detach()],
    ids=["by places in a pooling", "by a gate that is detached"],
)
def test_filters_that_only_go_together_are_left_out_where_the_graph_cannot_see_it(how):
    torch.manual_seed(0)
    model = Middle(how, 8, 8, other=conv(8, 8)).double()
    with pytest.warns(UserWarning, match=r"can't go: .*\bfirst\b.*\("):
        assert list(filter_scores(model, images_and_labels())) == ["second"]


def test_a_depthwise_convolution_with_a_multiplier_loses_the_same_of_each_channel():
    """Its filters go across all groups, and so the convolution before it stays whole."""
    torch.manual_seed(0)
    model = Middle(lambda m, z: F.silu(m.several(F.silu(z))), 4, 8, several=conv(4, 8, groups=4))
    model, data = model.double().eval(), images_and_labels()
    with pytest.warns(UserWarning, match=r"first \(4 filters that can only go together\)"):
        scores = filter_scores(model, data)
    assert {name: len(values) for name, values in scores.items()} == {"several": 2, "second": 5}

    def gate(group, z):
        z = z.clone()
        z[:, 1::2] = 0
        return z

    small = remove_filters(model, {"several": [1]}, data)
    assert_close(small(data.tensors[0]), model(data.tensors[0], gate))
    assert small.several.groups == small.several.out_channels == 4
    with pytest.raises(TypeError, match="first can't lose filters: 4 filters"):
        remove_filters(model, {"first": [0]}, data)


class Dense(nn.Module):
    """As in DenseNet, a batch norm on the concatenation of what two convolutions put out."""

    def __init__(self):
        super().__init__()
        self.groups = {name: [name] for name in ("first", "other", "last")}
        self.first, self.other, self.norm = conv(1, 3), conv(3, 2), norm(5)
        self.last, self.head = conv(5, 4), nn.Linear(4, 3)

    def forward(self, x, gate=no_gate):
        first = self.first(x)
        other = self.other(gate("first", F.silu(first)))
        joined = F.silu(self.norm(torch.cat([first, other], 1)))
        if gate is not no_gate:
            joined = torch.cat([gate("first", joined[:, :3]), gate("other", joined[:, 3:])], 1)
        return self.head(gate("last", F.silu(self.last(joined))).mean((2, 3)))


def test_filters_whose_maps_share_a_batch_norm_are_scored_and_go():
    torch.manual_seed(0)
    model, data = Dense().double().eval(), images_and_labels()
    scores = filter_scores(model, data)
    assert list(scores) == list(model.groups)
    for name, maps in maps_and_slopes(model, data).items():
        assert_close(scores[name], BY_HAND["taylor"](*maps))
    for filters in ({"first": [0, 2]}, {"other": [1]}, {"first": [1], "other": [0], "last": [3]}):
        small = remove_filters(model, filters, data)
        assert_close(small(data.tensors[0]), model(data.tensors[0], closed(filters)))
        assert small.norm.num_features == 5 - sum(
            len(filters.get(n, [])) for n in ("first", "other")
        )


# 8. Networks that come back, and threads


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_network_comes_back_from_what_was_removed_and_a_batch_of_images(kind, tmp_path):
    model, data = network(kind, 3), images_and_labels()
    images, filters = data.tensors[0], some_filters(model, 1)
    small = remove_filters(model, filters, data)
    fit(small, data, data, epochs=1)
    torch.save({"removed": filters, "state_dict": small.state_dict()}, tmp_path / "small.pt")
    stored = torch.load(tmp_path / "small.pt")
    back = remove_filters(network(kind, 3, seed=7), stored["removed"], images[:1])
    back.load_state_dict(stored["state_dict"])
    assert_same(back(images), small(images))
    last = list(prune_iteratively(model, data, data, macs=0.4, updates=1, per_step=6))[-1]
    removed = {n: [k for k in range(w) if k not in last.kept[n]] for n, w in widths(model).items()}
    back = remove_filters(network(kind, 3, seed=7), removed, torch.randn(2, 1, 8, 8).double())
    back.load_state_dict(last.model.state_dict())
    assert_same(back(images), last.model(images))


@pytest.mark.parametrize("kind", KINDS)
def test_to_remove_twice_is_to_remove_once(kind):
    model, data = network(kind, 3), images_and_labels()
    rng, first, second, both = random.Random(1), {}, {}, {}
    for name, width in widths(model).items():
        first[name] = sorted(rng.sample(range(width), rng.randint(0, width - 2)))
        left = [k for k in range(width) if k not in first[name]]
        again = sorted(rng.sample(left, rng.randint(0, len(left) - 1)))
        second[name] = [left.index(k) for k in again]
        both[name] = sorted(first[name] + again)
    once = remove_filters(model, both, data)
    twice = remove_filters(remove_filters(model, first, data), second, data)
    assert_same(twice.state_dict(), once.state_dict())
    assert str(twice) == str(once)
    assert_same(twice(data.tensors[0]), once(data.tensors[0]))


@pytest.mark.parametrize("sequential", [True, False])
def test_a_network_that_another_thread_uses_meanwhile_has_the_same_scores(sequential):
    torch.manual_seed(0)
    chain = nn.Sequential(conv(1, 4), nn.SiLU(), conv(4, 5), nn.Flatten(), nn.Linear(320, 3))
    model = (chain if sequential else Middle(lambda m, z: F.silu(z))).double().eval()
    data, over = images_and_labels(), threading.Event()
    alone, right = filter_scores(model, data), model(data.tensors[0]).detach()
    wrong = []

    def serve():
        while not over.is_set():
            with torch.no_grad():
                wrong.extend([] if model(data.tensors[0]).equal(right) else [1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(10):
            assert_same(filter_scores(model, data), alone)
    finally:
        over.set()
        thread.join()
    assert not wrong


def test_two_threads_give_what_each_gives_alone_and_leave_nothing_behind():
    data = images_and_labels()
    images = data.tensors[0]

    def work(kind, results):
        model = models[kind]
        filters = some_filters(model, 0)
        for _ in range(2):
            results.append(filter_scores(model, data, batch_size=2))
            results.append(remove_filters(model, filters, data).state_dict())
            with mask_filters(model, filters, data):
                results.append(model(images).detach())

    models = {kind: network(kind) for kind in KINDS}
    before = all_of_pytorch()
    alone = {kind: [] for kind in KINDS}
    for kind in KINDS:
        work(kind, alone[kind])
    together = {kind: [] for kind in KINDS}
    threads = [threading.Thread(target=work, args=item) for item in together.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([together[kind] for kind in KINDS], [alone[kind] for kind in KINDS])
    assert all_of_pytorch() == before


def all_of_pytorch():
    """What is found at the places that a library could put something of its own."""
    places = [builtins, nn.Module, nn.Conv2d, nn.Linear, nn.BatchNorm2d, torch.Tensor, F]
    places += [torch.autograd, torch.utils.data, nn.Parameter, nn.Sequential, copy, random]
    return [{name: id(value) for name, value in vars(place).items()} for place in places]


# 9. Reading leaves alone


def all_around(model, data):
    """``state_of``, and that all is in the same places."""
    tensors = [*model.parameters(), *model.buffers(), *data.tensors]
    return {
        **state_of(model, *data.tensors),
        "places": [(t.data_ptr(), t._version) for t in tensors],
        "objects": [(id(m), sorted(map(str, vars(m)))) for m in model.modules()],
    }


ALL = {
    "filter_scores": lambda m, d: filter_scores(m, d),
    "filter_scores by obd": lambda m, d: filter_scores(m, d, "obd"),
    "filter_scores by oracle": lambda m, d: filter_scores(m, d, "oracle"),
    "filter_scores by mutual information": lambda m, d: filter_scores(m, d, "mutual_information"),
    "remove_filters": lambda m, d: remove_filters(m, {next(iter(m.groups)): [0]}, d),
    "mask_filters": lambda m, d: masked_pass(m, d),
    "filter_costs": lambda m, d: filter_costs(m, d),
    "count_macs": lambda m, d: count_macs(m, d.tensors[0]),
    "evaluate": lambda m, d: evaluate(m, d),
    "TaylorPruner": lambda m, d: taylor_pruner(m, d).prune(macs=0.7),
    "prune_iteratively": lambda m, d: list(prune_iteratively(m, d, d, macs=0.6, updates=1)),
}


def masked_pass(model, data):
    flags = [(layer, layer.training) for layer in model.modules()]
    with mask_filters(model, {next(iter(model.groups)): [0]}, data), torch.no_grad():
        model.eval()(data.tensors[0])
    for layer, flag in flags:
        layer.training = flag


def taylor_pruner(model, data):
    pruner = TaylorPruner(model)
    pruner.score(data)
    return pruner


@pytest.mark.parametrize("kind, way", [(KINDS[i % 3], way) for i, way in enumerate(ALL)])
def test_everything_leaves_the_network_the_data_and_the_random_numbers_alone(kind, way):
    model, data = network(kind), images_and_labels()
    model.to(memory_format=torch.channels_last).train()
    first, *_, last = model.children()
    last.requires_grad_(False)
    first.eval()
    data.tensors[0].requires_grad_(False)
    F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = all_around(model, data)
    ALL[way](model, data)
    assert_same(all_around(model, data), before)


class Keeps(nn.Module):
    """Its forward keeps what pooling and flattening made, to look at."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = conv(1, 3), nn.Linear(48, 3)

    def forward(self, x):
        self.kept = F.max_pool2d(F.silu(self.conv(x)), 2).flatten(1)
        return self.head(self.kept)


def test_nothing_is_left_on_a_tensor_that_the_forward_keeps():
    model, data = Keeps().double().eval(), images_and_labels()
    filter_scores(model, data, "activation_mean")
    assert not vars(model.kept)
