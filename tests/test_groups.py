"""Filters that go together: their score is a gate's derivative, and a closed gate is removal."""

import copy
import random
import warnings

import pytest
import torch
import torchvision
from hypothesis import given
from networks import (
    PROPERTY,
    SEEDS,
    assert_same,
    random_data,
    random_network,
    state_of,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cnn_pruning import (
    TaylorPruner,
    filter_scores,
    mask_filters,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.measure import filter_costs
from cnn_pruning.network import reading, removal


class Residual(nn.Module):
    """Additions with and without batch norm behind them, a depthwise convolution, a concatenation.

    ``gate(group, z)`` stands where a map goes into a layer that mixes channels, ``summand`` on what
    is added. Maps that go into two layers are gated once.
    """

    def __init__(self, seed: int):
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        w, inner, c, d, left, right = (rng.randint(2, 4) for _ in range(6))
        self.act = rng.choice([F.relu, F.silu, torch.sigmoid])
        self.stem = normed(nn.Conv2d(2, w, 3, padding=1))
        self.a = normed(nn.Conv2d(w, inner, 3, padding=1))
        self.b = normed(nn.Conv2d(inner, w, 3, padding=1))
        self.c = nn.Conv2d(w, c, 3, stride=2, padding=1)
        self.d = normed(nn.Conv2d(c, d, 1))
        self.across = nn.Conv2d(w, d, 1, stride=2)
        self.before = norm(d)
        self.left, self.right = nn.Conv2d(d, left, 1), nn.Conv2d(d, right, 3, padding=1)
        self.f = nn.Conv2d(left + right, d, 1)
        self.last = norm(d)
        self.depthwise = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.head = nn.Linear(4 * d, 3)
        self.double().eval()

    def forward(self, x, gate=lambda group, z: z, summand=lambda group, z: z):
        stem = summand("stem.0", self.act(self.stem(x)))
        x = F.max_pool2d(stem, 2)
        inner = self.act(self.a(F.max_pool2d(gate("stem.0", stem), 2)))
        x = self.act(x + summand("stem.0", self.b(gate("a.0", inner))))
        gated = gate("stem.0", x)
        inner = self.act(self.c(gated))
        x = summand("d.0", self.d(gate("c", inner))) + summand("d.0", self.across(gated))
        gated = gate("d.0", self.act(self.before(x)))
        left, right = gate("left", self.act(self.left(gated))), gate("right", self.right(gated))
        x = x + summand("d.0", self.f(torch.cat([left, right], 1)))
        x = gate("d.0", self.act(self.depthwise(self.act(self.last(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


GROUPS = ["stem.0", "a.0", "c", "d.0", "left", "right"]  # in the order they are used


def norm(width):
    return randomized(nn.BatchNorm2d(width))


def normed(conv):
    return nn.Sequential(conv, norm(conv.out_channels))


def randomized(model):
    """Batch norms that change their maps in evaluation mode, too."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model


def random_images(seed=0, size=5, shape=(2, 8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *shape, dtype=dtype, generator=generator)
    return TensorDataset(images, torch.randint(3, (size,), generator=generator))


def widths(model):
    first = {"stem.0": model.stem[0], "a.0": model.a[0], "c": model.c, "d.0": model.d[0]}
    first |= {"left": model.left, "right": model.right}
    return {name: conv.out_channels for name, conv in first.items()}


def gates_of(model, images):
    return {
        name: torch.ones(len(images), filters, dtype=torch.float64, requires_grad=True)
        for name, filters in widths(model).items()
    }


def multiply(gates):
    return lambda group, z: z * gates[group][..., None, None]


def some_filters(model, seed):
    rng = random.Random(seed)
    return {n: rng.sample(range(k), rng.randint(0, k - 1)) for n, k in widths(model).items()}


@pytest.mark.parametrize("seed", range(6))
def test_the_score_is_the_derivative_of_one_gate_on_all_maps_of_the_group(seed):
    model, data = Residual(seed), random_images(seed)
    images, labels = data.tensors
    maps = {name: [] for name in GROUPS}

    def keep(group, z):
        z = z * 1  # its own gradient: without what comes back past the gate
        maps[group].append(z)
        return z

    loss = F.cross_entropy(model(images, keep), labels, reduction="sum")
    every = [z for name in GROUPS for z in maps[name]]
    slopes = dict(zip(map(id, every), torch.autograd.grad(loss, every), strict=True))

    gates = gates_of(model, images)
    loss = F.cross_entropy(model(images, multiply(gates)), labels, reduction="sum")
    derivatives = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))

    scores = filter_scores(model, data, batch_size=2)
    assert list(scores) == GROUPS
    assert [len(maps[name]) for name in GROUPS] == [2, 1, 1, 2, 1, 1]
    for name, score in scores.items():
        sums = sum((z * slopes[id(z)]).sum((2, 3)) for z in maps[name])
        torch.testing.assert_close(derivatives[name], sums)
        values = sum(z[0, 0].numel() for z in maps[name])
        torch.testing.assert_close(score, sums.abs().mean(0) / values)


@pytest.mark.parametrize("seed", range(6))
def test_a_closed_gate_on_all_maps_is_removal(seed):
    model, data = Residual(seed), random_images(seed)
    images = data.tensors[0]
    filters = some_filters(model, seed)
    gates = {n: torch.ones(1, k, dtype=torch.float64) for n, k in widths(model).items()}
    for name, gone in filters.items():
        gates[name][:, gone] = 0
    closed = model(images, multiply(gates))
    small = remove_filters(model, filters, data)
    with mask_filters(model, filters, data):
        torch.testing.assert_close(model(images), closed)
    torch.testing.assert_close(small(images), closed)
    kept = {name: width - len(filters[name]) for name, width in widths(model).items()}
    assert widths(small) == kept
    assert small.depthwise.groups == small.across.out_channels == kept["d.0"]
    if any(filters.values()):
        assert (closed - model(images)).abs().max() > 1e-6, "removal must be seen to change it"
        again = filter_scores(small, data)  # a depthwise convolution of one channel mixes them all
        assert {name: len(again[name]) for name in again if name != "depthwise"} == kept


def test_a_gate_on_each_summand_is_the_same_gate_unless_a_batch_norm_follows():
    """ReLU, pooling and addition carry a factor on; so no path through a group is counted twice."""
    model, data = Residual(0), random_images()
    model.act = F.relu
    images, labels = data.tensors
    gates = gates_of(model, images)
    loss = F.cross_entropy(model(images, summand=multiply(gates)), labels, reduction="sum")
    slope, behind = torch.autograd.grad(loss, [gates["stem.0"], gates["d.0"]])
    scores = filter_scores(model, data)
    ratio = slope.abs().mean(0) / scores["stem.0"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 8 * 8 + 4 * 4))
    with pytest.raises(AssertionError):
        ratio = behind.abs().mean(0) / scores["d.0"]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 2 * 2 + 2 * 2))


@PROPERTY
@given(SEEDS)
def test_both_ways_of_reading_give_one_description(seed):
    """A sequence read from its modules, and from the graph of what it computes."""
    network = random_network(seed)
    model, images = nn.Sequential(*network.layers).eval(), random_data(network).tensors[0]
    by_modules = reading.read_sequential(model)
    groups, left_out = reading.read_graph(reading.passes.copy_of(model), images)
    assert list(groups) == list(by_modules.groups) and left_out == by_modules.left_out
    for name, group in groups.items():
        expected = by_modules.groups[name]
        assert group.filters == expected.filters

        def seen(group):
            return {(p.name, p.side): (p.channels.tolist(), p.owners.tolist()) for p in group.parts}

        assert seen(group) == seen(expected)


@PROPERTY
@given(SEEDS)
def test_a_pruned_network_s_description_is_what_reading_it_again_gives(seed):
    model, data = Residual(seed), random_images(seed)
    network = reading.read(model, data.tensors[0])
    filters = {
        name: random.Random(seed).sample(range(k), k // 2) for name, k in network.filters().items()
    }
    small = removal.remove(network, filters)
    again = reading.read(small.model, data.tensors[0])
    if min(again.filters().values()) > 1:  # one channel is tied to nothing
        assert small.filters() == again.filters()
        for name, group in small.groups.items():
            for part in group.parts:
                (other,) = [
                    p
                    for p in again.groups[name].parts
                    if (p.name, p.side) == (part.name, part.side)
                ]
                assert torch.equal(part.channels, other.channels), part.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_networks(name, dtype):
    torch.manual_seed(0)
    model = randomized(torchvision.models.get_model(name, weights=None)).to(dtype).eval()
    data = random_images(size=3, shape=(3, 32, 32), dtype=dtype)
    images = data.tensors[0]
    scores = filter_scores(model, data)
    assert all(values.isfinite().all() and values.dtype == dtype for values in scores.values())
    filters = select_filters(normalize(scores), sum(map(len, scores.values())) // 3)
    small = remove_filters(model, filters, data)
    for layer, values in scores.items():
        conv = small.get_submodule(layer)
        assert conv.out_channels == len(conv.weight) == len(values) - len(filters[layer])
    for layer in small.modules():
        if isinstance(layer, nn.Conv2d):
            shape = (layer.out_channels, layer.in_channels // layer.groups)
            assert layer.weight.shape[:2] == shape
            assert layer.groups in (1, layer.in_channels)
    with torch.no_grad():
        whole, removed = model(images), small(images)
        with mask_filters(model, filters, data):
            masked = model(images)
    # The sums have fewer terms in another order. 20 (or 52) layers of up to 4,608 terms: some
    # hundred times eps, of the largest logit.
    tolerance = 300 * torch.finfo(dtype).eps * masked.abs().max()
    assert removed.shape == (3, 1000)
    assert (removed - masked).abs().max() < tolerance
    assert (masked - whole).abs().max() > 100 * tolerance


def test_groups_of_resnet18_are_its_stages_and_the_inside_of_each_block():
    model = torchvision.models.resnet18(weights=None)
    scores = filter_scores(model, random_images(size=2, shape=(3, 32, 32), dtype=torch.float32))
    stages = ["conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    inside = [f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)]
    assert sorted(scores) == sorted(stages + inside)


class Net(nn.Module):
    """``how`` is the forward, a function of the network and the images."""

    def __init__(self, how, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.how = how
        self.double()

    def forward(self, x):
        return self.how(self, x)


def head(width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def test_grouped_convolutions_lose_the_same_in_each_of_their_groups():
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(m.last(F.relu(m.grouped(F.relu(m.first(x)))))),
        **{"first": conv(2, 6), "grouped": conv(6, 4, groups=2), "last": conv(4, 5)},
        head=head(5),
    )
    data = random_images()
    scores = filter_scores(model, data)
    assert {name: len(values) for name, values in scores.items()} == {
        "first": 3,
        "grouped": 2,
        "last": 5,
    }
    small = remove_filters(model, {"first": [1], "grouped": [0]}, data)
    assert_same(small.first.weight, model.first.weight[[0, 2, 3, 5]])
    assert_same(small.grouped.weight, model.grouped.weight[[1, 3]][:, [0, 2]])
    assert small.grouped.groups == 2


def squeezed(m, x):
    scale = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))
    return m.head(m.last(x * scale[..., None, None]))


def upsampled(m, x):
    small = F.relu(m.down(F.max_pool2d(x, 2)))
    return m.head(m.last(torch.cat([x, m.up(small, output_size=x.shape[2:])], 1)))


WAYS = {
    "one PReLU in two places": (
        lambda m, x: m.head(m.act(m.last(m.act(x)))),
        {"last": conv(4, 5), "act": nn.PReLU(), "head": head(5)},
        ["first", "last"],
    ),
    "a parameter for each channel": (
        lambda m, x: m.head(F.relu(m.last(x * m.scale) * m.gain + x)),
        {
            **{"scale": nn.Parameter(torch.rand(4, 1, 1)), "gain": nn.Parameter(torch.rand(1))},
            **{"last": conv(4, 4), "head": head(4)},
        },
        ["first"],
    ),
    "squeeze and excitation": (
        squeezed,
        {"down": nn.Linear(4, 3), "up": nn.Linear(3, 4), "last": conv(4, 5), "head": head(5)},
        ["first", "last"],
    ),
    "a transposed convolution": (
        upsampled,
        {"down": conv(4, 5), "up": nn.ConvTranspose2d(5, 3, 2, 2), "last": conv(7, 5)}
        | {"head": head(5)},
        ["first", "down", "up", "last"],
    ),
    "one convolution used twice": (
        lambda m, x: m.head(F.relu(m.last(F.relu(m.last(x))))),
        {"last": conv(4, 4), "head": head(4)},
        ["first"],
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_tie_channels(way):
    how, layers, expected = WAYS[way]
    model = Net(lambda m, x: how(m, F.relu(m.first(x))), first=conv(2, 4), **layers)
    data = random_images()
    scores = filter_scores(model, data)
    assert list(scores) == expected
    filters = select_filters(scores, len(expected), keep=expected[2:])
    with mask_filters(model, filters, data):
        masked = model(data.tensors[0])
    torch.testing.assert_close(remove_filters(model, filters, data)(data.tensors[0]), masked)


def test_filters_that_are_tied_twice_are_one_group_of_all_of_them():
    torch.manual_seed(0)
    model = Net(  # 0 with 4, 1 with 5 and so on, by the maximum; and then 0 with 1, by the norm
        lambda m, x: m.head(m.last(F.relu(m.norm(torch.max(*m.first(x).chunk(2, 1)))))),
        **{"first": conv(2, 8), "norm": nn.GroupNorm(2, 4), "last": conv(4, 5), "head": head(5)},
    )
    data = random_images()
    assert {n: len(values) for n, values in filter_scores(model, data).items()} == {
        "first": 2,
        "last": 5,
    }
    small = remove_filters(model, {"first": [0]}, data)
    assert_same(small.first.weight, model.first.weight[[2, 3, 6, 7]])


def test_what_is_tied_to_the_images_or_the_outputs_is_left_out():
    torch.manual_seed(0)
    data = random_images()
    layers = {"a": conv(2, 4), "b": conv(4, 2), "c": conv(4, 5), "head": head(5)}
    added = Net(lambda m, x: m.head(m.c(torch.cat([x, m.b(F.relu(m.a(x))) + x], 1))), **layers)
    assert list(filter_scores(added, data)) == ["a", "c"]
    joined = Net(lambda m, x: m.head(m.c(torch.cat([x, m.b(F.relu(m.a(x)))], 1))), **layers)
    assert list(filter_scores(joined, data)) == ["a", "b", "c"]
    small = remove_filters(joined, {"b": [0]}, data)
    assert_same(small.c.weight, joined.c.weight[:, [0, 1, 3]])
    pixels = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(2, 4), b=conv(4, 2))
    segments = TensorDataset(data.tensors[0], torch.ones(5, 8, 8).long())

    def cost(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none").mean((1, 2))

    assert list(filter_scores(pixels, segments, cost=cost)) == ["a"]


def test_the_network_is_left_as_it_was_and_its_copy_keeps_what_it_had():
    model, data = Residual(1), random_images()
    model.train().to(memory_format=torch.channels_last)
    model.a.requires_grad_(False)
    F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    before = state_of(model)
    with torch.inference_mode():
        scores = filter_scores(model, data)
        small = remove_filters(model, {"stem.0": [0]}, data)
    with mask_filters(model, {"stem.0": [0]}, data):
        pass
    assert_same(state_of(model), before)
    assert scores["a.0"].any(), "frozen layers are scored, too"
    assert small.training and not small.a[0].weight.requires_grad and small.b[0].weight.grad is None
    assert small.b[0].weight.is_contiguous(memory_format=torch.channels_last)
    F.cross_entropy(small(data.tensors[0]), data.tensors[1]).backward()
    assert small.b[0].weight.grad is not None


def test_a_warning_names_three_layers_of_a_reason_and_counts_the_others():
    def how(m, x):
        for layer in m.before:
            x = F.relu(layer(x))
        return m.head(F.relu(m.last(x.detach())))

    before = nn.ModuleList([conv(2, 4), *(conv(4, 4) for _ in range(4))])
    model = Net(how, before=before, last=conv(4, 5), head=head(5))
    message = r"before\.0, before\.1, before\.2 and 2 others \(no gradient comes back"
    with pytest.warns(UserWarning, match=message):
        assert list(filter_scores(model, random_images())) == ["last"]


OBSTACLES = {
    "layer norm": (nn.LayerNorm(8), 4, "norm is a LayerNorm"),
    "response norm": (
        nn.LocalResponseNorm(3, alpha=1e-4),
        4,
        "avg_pool3d behind them uses several of them at once",
    ),
    "softmax": (nn.Softmax(1), 4, "softmax behind them uses several of them at once"),
    "pixel shuffle": (nn.PixelShuffle(2), 1, "pixel_shuffle behind them counts on their number"),
    "a weight computed from others": (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        *(4, r"norm.* has a weight that is computed from others \(use remove_parametrizations"),
    ),
}


@pytest.mark.parametrize("way", OBSTACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cannot_go_exactly_is_left_out_by_name_and_refused_to_be_removed(way, dtype):
    norm, width, why = OBSTACLES[way]
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(F.relu(m.b(m.norm(m.a(x))))),
        **{"a": conv(2, 4), "norm": norm, "b": conv(width, 5), "head": head(5)},
    ).to(dtype)
    data = random_images(dtype=dtype)
    with pytest.warns(UserWarning, match=rf"^Left out, because they can't go: a.* \({why}"):
        scores = filter_scores(model, data)
    assert list(scores) == ["b"]
    with pytest.raises(TypeError, match=f"^a can't lose .*{why}"):
        remove_filters(model, {"a": [1]}, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep = ["a", "norm"] if isinstance(norm, nn.Conv2d) else ["a"]
        assert list(filter_scores(model, data, keep=keep)) == ["b"]
    remove_filters(model, select_filters(scores, 2), data)


def test_layers_that_share_a_weight_are_left_out():
    layers = {name: conv(4, 4) for name in "abc"}
    model = Net(
        lambda m, x: m.head(F.relu(m.c(F.relu(m.b(F.relu(m.a(m.first(x)))))))),
        **{"first": conv(2, 4), **layers, "head": head(4)},
    )
    model.c.weight = model.b.weight
    data = random_images()
    with pytest.warns(UserWarning, match=r"a, b \([bc] shares a weight with another layer\)"):
        scores = filter_scores(model, data)
    assert list(scores) == ["first"]
    remove_filters(model, select_filters(scores, 2), data)


@pytest.mark.parametrize(
    "filters, message",
    [
        ({"b.0": [0]}, r"^b\.0 goes with stem\.0: name filters of stem\.0\."),
        ({"b": [0]}, "'b' is not a layer whose filters can go: those are 'stem.0', 'a.0'"),
        ({"last": [0]}, r"^last goes with d\.0"),
        ({"a.0": [9]}, r"a.0 has filters 0 to 2, but \[9\] were named"),
        ({"a.0": [0, 0]}, "a.0 has a filter named twice"),
        ({"a.0": [0.5]}, "a.0 must be a list of integers"),
        ({"a.0": torch.tensor([True, False, False])}, r"\]: of a mask, take nonzero\(\)\.flatten"),
        ({"a.0": range(3)}, "a.0 would lose all of its 3 filters: leave at least one"),
    ],
)
def test_bad_filters_are_refused(filters, message):
    model = Residual(0)
    assert widths(model)["a.0"] == 3
    with pytest.raises(ValueError, match=message):
        remove_filters(model, filters, random_images())


def test_other_mistakes_are_refused():
    model, data = Residual(0), random_images()
    with pytest.raises(ValueError, match=r"keep names b\.5, but the network has no such layer"):
        filter_scores(model, data, keep="b.5")
    with pytest.raises(ValueError, match=r"can't take a batch of float64 \(2, 3, 8, 8\) images"):
        filter_scores(model, random_images(shape=(3, 8, 8)))
    with pytest.raises(TypeError, match=r"hand in the network inside, model\.module"):
        filter_scores(nn.DataParallel(model), data)
    with pytest.raises(TypeError, match=r"Residual isn't a Sequential .*hand in data too"):
        remove_filters(model, {"c": [0]})
    without_gradient = Net(
        lambda m, x: m.head(F.relu(m.first(x)).detach()), first=conv(2, 4), head=head(4)
    )
    with pytest.raises(TypeError, match=r"no filters .*first \(no gradient comes back"):
        filter_scores(without_gradient, data)


def test_a_head_that_is_used_in_training_alone_loses_the_same_channels():
    aux = nn.Sequential(conv(4, 3), nn.BatchNorm2d(3), nn.ReLU(), head(3))
    model = Net(
        lambda m, x: (lambda z: m.head(m.b(z)) + (m.aux(z) if m.training else 0))(F.relu(m.a(x))),
        **{"a": conv(2, 4), "b": conv(4, 5), "head": head(5), "aux": aux},
    )
    data = random_images()
    with pytest.warns(UserWarning, match=r"aux\.0 \(it is used in training alone\)"):
        assert list(filter_scores(model, data)) == ["a", "b"]
    small = remove_filters(model, {"a": [1, 2]}, data)
    assert small.aux[0].in_channels == 2
    with mask_filters(model.train(), {"a": [1, 2]}, data):
        masked = model(data.tensors[0])
    torch.testing.assert_close(small.train()(data.tensors[0]), masked)


def test_keep_of_everything_leaves_no_scores():
    model, data = Residual(0), random_images()
    for criterion in ("taylor", "apoz", "weight"):
        assert filter_scores(model, data, criterion, keep=GROUPS) == {}


def test_a_norm_before_an_activation_in_place_loses_its_channels_too():
    model = Net(
        lambda m, x: m.head(m.last(m.act(m.norm(m.first(x))))),
        **{"first": conv(2, 4), "norm": nn.InstanceNorm2d(4, affine=True)},
        **{"act": nn.ReLU(inplace=True), "last": conv(4, 5), "head": head(5)},
    )
    data = random_images()
    assert list(filter_scores(model, data)) == ["first", "last"]
    assert [row["filters"] for row in filter_costs(model, data)] == [4, 5]
    small = remove_filters(model, {"first": [0, 2]}, data)
    assert small.norm.num_features == 2 and small.act.inplace


class Preactivated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.relu_())


def test_frozen_layers_score_alike_before_a_convolution_that_changes_its_input_in_place():
    torch.manual_seed(0)
    layers = {"first": conv(2, 4), "last": Preactivated(4, 5, 3), "head": head(5)}
    model, data = Net(lambda m, x: m.head(m.last(m.first(x))), **layers), random_images()
    expected = filter_scores(model, data)
    model.first.requires_grad_(False)
    torch.testing.assert_close(filter_scores(model, data), expected)


def test_one_map_that_is_multiplied_with_all_others_ties_nothing():
    model = Net(
        lambda m, x: (lambda z: m.head(m.last(z * torch.sigmoid(m.gate(z)))))(F.relu(m.first(x))),
        **{"first": conv(2, 6), "gate": nn.Conv2d(6, 1, 1), "last": conv(6, 5), "head": head(5)},
    )
    data = random_images()
    assert list(filter_scores(model, data)) == ["first", "last"]
    small = remove_filters(model, {"first": [0, 3]}, data)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for taker in (zeroed.gate, zeroed.last):
            taker.weight[:, [0, 3]] = 0
    torch.testing.assert_close(small(data.tensors[0]), zeroed(data.tensors[0]))


def test_keep_names_modules_with_all_that_is_inside_and_nothing_without_filters():
    layers = {"block": nn.Sequential(conv(2, 4), nn.ReLU()), "act": nn.ReLU()}
    model = Net(
        lambda m, x: m.head(m.act(m.last(m.block(x)))), **layers, last=conv(4, 5), head=head(5)
    )
    data = random_images()
    assert list(filter_scores(model, data, keep="block")) == ["last"]
    with pytest.raises(ValueError, match=r"keep names act, which has no filters"):
        filter_scores(model, data, keep="act")


def test_keep_names_any_layer_of_a_group():
    model, data = Residual(0), random_images()
    for name in ("stem.0", "b.0", "b.1"):
        assert list(filter_scores(model, data, keep=name)) == GROUPS[1:]
    pruner = TaylorPruner(model, keep=["b.0", "across"])
    pruner.score(data)
    assert not pruner.select(3)["stem.0"] and not pruner.select(3)["d.0"]
