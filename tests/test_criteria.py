import copy
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    PROPERTY,
    SEEDS,
    Parts,
    assert_same,
    random_data,
    random_network,
    state_of,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset, TensorDataset

from cnn_pruning import (
    CNN,
    evaluate,
    feature_maps,
    filter_scores,
    normalize,
    remove_filters,
)
from cnn_pruning.criteria import CRITERIA, obd, taylor
from cnn_pruning.feature_maps import scorable
from cnn_pruning.oracle import oracle

# Everything is float64, so assert_close's own tolerances (1e-7 relative) leave room for rounding
# only.


def taylor_by_gates(network, data):
    """Eq. 8 by another way: a gate of 1 on each feature map of each example; the loss's derivative
    with respect to the gate is the sum over positions of z dC/dz."""
    network = copy.deepcopy(network)
    network.model.eval()
    images, labels = data.tensors
    wanted = {position: name for name, position in network.feature_maps().items()}
    gates, positions = {}, {}
    x, filters = images, None
    for i, layer in enumerate(network.layers):
        x = layer(x)
        filters = layer.out_channels if isinstance(layer, nn.Conv2d) else filters
        if i in wanted:
            gate = torch.ones(len(x), filters, 1, dtype=x.dtype, requires_grad=True)
            maps = x.reshape(len(x), filters, -1)
            gates[wanted[i]], positions[wanted[i]] = gate, maps.shape[2]
            x = (maps * gate).reshape(x.shape)
    loss = cross_entropy(x, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(gates.values()))
    return {
        name: (gradient.squeeze(2) / positions[name]).abs().mean(0)
        for name, gradient in zip(gates, gradients, strict=True)
    }


@PROPERTY
@given(SEEDS)
def test_the_taylor_criterion_is_equation_8(seed):
    network = random_network(seed)
    data = random_data(network, seed=seed)
    torch.testing.assert_close(filter_scores(network.model, data), taylor_by_gates(network, data))


def test_taylor_on_numbers_worked_out_by_hand():
    z = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    gradient = torch.tensor([[[1.0, -2.0], [0.5, 0.5]]])
    # |1 - 4| / 2 and |1.5 - 0.5| / 2; the absolute value of each position would give 2.5 and 1
    assert_same(taylor(z, gradient), torch.tensor([[1.5, 0.5]]))


@PROPERTY
@given(SEEDS)
def test_scores_do_not_depend_on_the_batch_size(seed):
    network = random_network(seed)
    data = random_data(network, size=7)
    whole = filter_scores(network.model, data, batch_size=7)
    for batch_size in (1, 3):
        scores = filter_scores(network.model, data, batch_size=batch_size)
        torch.testing.assert_close(scores, whole)


def test_small_batches_are_joined_and_the_scores_are_the_same(monkeypatch):
    sizes = []

    def watched(feature_map, gradient):
        sizes.append(len(feature_map))
        return taylor(feature_map, gradient)

    network = random_network(0)
    data = random_data(network, size=50)
    apart = filter_scores(network.model, data, watched, batch_size=3)
    assert max(sizes) == 3
    sizes.clear()
    monkeypatch.setattr(feature_maps, "JOINED", 1000)
    together = filter_scores(network.model, data, watched, batch_size=3)
    assert max(sizes) >= 32 and sum(sizes) == 50 * len(apart)
    torch.testing.assert_close(together, apart)
    sizes.clear()
    filter_scores(network.model, list(data), watched, batch_size=3)  # fetched one by one
    assert max(sizes) == 3


def test_a_large_batch_goes_through_in_pieces_so_that_the_memory_does_not_grow_with_it():
    sizes = []

    def watched(feature_map, gradient):
        sizes.append(len(feature_map))
        return taylor(feature_map, gradient)

    def cost(outputs, labels):
        sizes.append(len(outputs))
        return cross_entropy(outputs, labels, reduction="none")

    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 3)).double()
    data = TensorDataset(torch.randn(300, 1, 30, 100).double(), torch.arange(300) % 3)
    scores = filter_scores(model, data, watched, batch_size=300)
    # The feature maps of an image have 2 * 30 * 100 * 8 bytes.
    assert sum(sizes) == 300
    assert 5e6 < max(sizes) * 48_000 < 2e7
    torch.testing.assert_close(scores, filter_scores(model, data, "taylor", batch_size=25))

    sizes.clear()
    truth = filter_scores(model, data, "oracle", batch_size=300, cost=cost)
    assert 32 <= max(sizes) <= 128
    torch.testing.assert_close(truth, filter_scores(model, data, "oracle", batch_size=25))


@PROPERTY
@given(SEEDS)
def test_scores_do_not_depend_on_the_order_of_the_examples(seed):
    network = random_network(seed)
    data = random_data(network, size=6)
    order = random.Random(seed).sample(range(6), 6)
    shuffled = TensorDataset(*(tensor[order] for tensor in data.tensors))
    torch.testing.assert_close(
        filter_scores(network.model, shuffled, batch_size=4),
        filter_scores(network.model, data, batch_size=4),
    )


@PROPERTY
@given(SEEDS)
def test_scores_come_by_name_in_the_order_of_the_layers(seed):
    network = random_network(seed)
    scores = filter_scores(network.model, random_data(network))
    assert list(scores) == list(network.feature_maps())
    for name, values in scores.items():
        assert values.shape == (network.model.get_submodule(name).out_channels,)
        assert (values.dtype, values.requires_grad) == (torch.float64, False)


def test_layers_come_in_the_order_of_use_not_of_definition():
    # Parts defines its head first and uses it last.
    model = Parts(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()))
    model.head.append(nn.Linear(12, 3))
    data = TensorDataset(torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    assert list(filter_scores(model, data)) == ["features", "head.0"]


def test_a_convolution_that_puts_out_the_logits_has_no_scores():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    data = TensorDataset(torch.rand(2, 1, 6, 6), torch.tensor([0, 1]))
    assert list(filter_scores(model, data)) == ["0"]
    with pytest.raises(TypeError, match=r"no filters that could go .*the network's outputs"):
        filter_scores(model[2:], TensorDataset(torch.rand(2, 4, 6, 6), data.tensors[1]))


def test_scores_of_a_float32_network_are_float32():
    data = TensorDataset(torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2]))
    scores = filter_scores(CNN((2, 3)), data)
    assert {name: (len(v), v.dtype) for name, v in scores.items()} == {
        "network.0": (2, torch.float32),
        "network.2": (3, torch.float32),
    }


@pytest.mark.parametrize(
    ("activation", "same"), [(nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.GELU(), False)]
)
def test_taylor_is_the_same_before_and_after_relu_but_not_gelu(activation, same):
    # For a ReLU, z dC/dz = a dC/da at every position: both are 0 where it is closed.
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4, 3, 10, dtype=torch.float64, generator=generator).requires_grad_()
    after = activation(before)
    loss = (after * torch.randn(after.shape, dtype=torch.float64, generator=generator)).sum()
    gradients = torch.autograd.grad(loss, [before, after])
    left, right = taylor(before, gradients[0]), taylor(after, gradients[1])
    assert torch.allclose(left, right) == same


@PROPERTY
@given(SEEDS, st.booleans())
def test_scoring_leaves_nothing_behind(seed, has_grads):
    network = random_network(seed)
    rng = random.Random(seed)
    for module in network.model.modules():
        module.training = rng.random() < 0.5
    for parameter in network.model.parameters():
        parameter.requires_grad = rng.random() < 0.7
        if has_grads:
            parameter.grad = torch.ones_like(parameter)
    data = random_data(network)
    before = state_of(network.model)
    tensors = [tensor.clone() for tensor in data.tensors]
    filter_scores(network.model, data, batch_size=2)
    assert_same(state_of(network.model), before)
    assert_same(list(data.tensors), tensors)


def test_a_criterion_that_raises_leaves_nothing_behind():
    def broken(feature_map, gradient):
        raise ArithmeticError

    network = random_network(0)
    before = state_of(network.model)
    with pytest.raises(ArithmeticError):
        filter_scores(network.model, random_data(network), broken)
    assert_same(state_of(network.model), before)


@PROPERTY
@given(SEEDS)
def test_frozen_parameters_do_not_change_the_scores(seed):
    network = random_network(seed)
    data = random_data(network)
    expected = filter_scores(network.model, data)
    rng = random.Random(seed)
    for parameter in network.model.parameters():
        parameter.requires_grad = rng.random() < 0.5
    torch.testing.assert_close(filter_scores(network.model, data), expected)
    network.model.requires_grad_(False)
    torch.testing.assert_close(filter_scores(network.model, data), expected)


def test_dropout_and_batch_norm_are_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()
    data = TensorDataset(torch.randn(5, 1, 6, 6).double(), torch.tensor([0, 1, 2, 0, 1]))
    training = filter_scores(model.train(), data)
    assert_same(training, filter_scores(model.eval(), data))
    # In training mode the running statistics would have moved.
    assert model[1].num_batches_tracked == 0


def test_scoring_works_where_gradients_are_off():
    network = random_network(1)
    data = random_data(network)
    expected = filter_scores(network.model, data)
    with torch.no_grad():
        assert_same(filter_scores(network.model, data), expected)
        assert not torch.is_grad_enabled()


class Pairs(Dataset):
    def __init__(self, data):
        self.pairs = [(image, int(label)) for image, label in data]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


@pytest.mark.parametrize("kind", [Pairs, lambda data: Subset(data, range(5)), list])
def test_any_dataset_of_images_and_labels_gives_the_same_scores(kind):
    network = random_network(2)
    data = random_data(network)
    torch.testing.assert_close(
        filter_scores(network.model, kind(data), batch_size=2), filter_scores(network.model, data)
    )


class Scaled(TensorDataset):
    """Divides each image by its own largest value: right for one image, wrong for a batch."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image / image.abs().max(), label


def test_a_tensor_dataset_that_changes_its_images_is_read_one_image_at_a_time():
    network = random_network(2)
    data = Scaled(*random_data(network).tensors)
    torch.testing.assert_close(
        filter_scores(network.model, data, batch_size=5), filter_scores(network.model, Pairs(data))
    )


def test_a_function_is_given_feature_maps_and_gradients_and_its_mean_is_the_score():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 5, 3))
    model.double()
    images, labels = torch.randn(6, 1, 6, 7).double(), torch.arange(6) % 3
    z = model[:2](images).detach().requires_grad_()
    loss = cross_entropy(model[2:](z), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    data = TensorDataset(images, labels)
    for criterion, expected in [
        (lambda z, g: z.amax(2), z.detach().amax((2, 3))),
        (lambda z, g: g.square().sum(2), gradient.square().sum((2, 3))),
    ]:
        scores = filter_scores(model, data, criterion, batch_size=4)
        torch.testing.assert_close(scores, {"0": expected.mean(0)})


def test_an_unknown_criterion_is_an_error_that_lists_the_known_ones():
    network = random_network(0)
    with pytest.raises(ValueError, match=r"'tailor'.*'taylor'"):
        filter_scores(network.model, random_data(network), "tailor")


def test_no_examples_are_an_error():
    network = random_network(0)
    with pytest.raises(ValueError, match="empty"):
        filter_scores(network.model, random_data(network, size=0))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_a_batch_size_that_is_not_a_positive_integer_is_an_error(batch_size):
    network = random_network(0)
    with pytest.raises(ValueError, match="batch_size"):
        filter_scores(network.model, random_data(network), batch_size=batch_size)


# The other criteria, each against a slow and obvious second way


def maps_and_logits(network, images):
    """The feature maps (N, K, M) by name, with their graph, and the logits, layer by layer."""
    wanted = {position: name for name, position in network.feature_maps().items()}
    x, filters, maps = images, None, {}
    for i, layer in enumerate(network.layers):
        x = layer(x)
        filters = layer.out_channels if isinstance(layer, nn.Conv2d) else filters
        if i in wanted:
            maps[wanted[i]] = x = x.reshape(len(x), filters, -1).reshape(x.shape)
    return {name: (z, z.reshape(len(z), -1, z[0, 0].numel())) for name, z in maps.items()}, x


def one_by_one(network, data):
    """For each filter by name: its maps and the loss's gradient there, example by example."""
    network.model.eval()
    found = {}
    for image, label in data:
        with torch.enable_grad():
            maps, logits = maps_and_logits(network, image[None])
            loss = -logits.log_softmax(1)[0, label]
            slopes = torch.autograd.grad(loss, [z for z, _ in maps.values()])
        for (name, (z, _)), slope in zip(maps.items(), slopes, strict=True):
            filters = network.model.get_submodule(name).out_channels
            rows = found.setdefault(name, [[] for _ in range(filters)])
            for k in range(filters):
                rows[k].append((z.detach().reshape(filters, -1)[k], slope.reshape(filters, -1)[k]))
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values)


BY_HAND = {
    "taylor_abs_first": lambda rows: mean(mean(abs(a) for a in z * g) for z, g in rows),
    "taylor_abs_last": lambda rows: abs(mean(mean(z * g) for z, g in rows)),
    "taylor_squared": lambda rows: mean(sum(z * g) ** 2 for z, g in rows),
    "activation_mean": lambda rows: mean(mean(z) for z, _ in rows),
    "activation_std": lambda rows: torch.cat([z for z, _ in rows]).std(correction=0),
    "apoz": lambda rows: mean(sum(float(a > 0) for a in z) / len(z) for z, _ in rows),
}


@pytest.mark.parametrize("criterion", BY_HAND)
@pytest.mark.parametrize("seed", range(6))
def test_a_criterion_over_feature_maps_is_its_formula(criterion, seed):
    network = random_network(seed)
    data = random_data(network, seed=seed)
    expected = {
        name: torch.tensor([BY_HAND[criterion](rows) for rows in filters], dtype=torch.float64)
        for name, filters in one_by_one(network, data).items()
    }
    # A standard deviation near 0 is the root of a difference of squares: 1e-16 becomes 1e-8.
    atol = 1e-7 if criterion == "activation_std" else 1e-12
    scores = filter_scores(network.model, data, criterion, batch_size=2)
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=atol)


def information(left, right):
    pairs, size = list(zip(left, right, strict=True)), len(left)
    return sum(
        count / size * math.log(size * count / (left.count(a) * right.count(b)))
        for (a, b), count in Counter(pairs).items()
    )


@pytest.mark.parametrize("seed", range(6))
def test_mutual_information_is_that_of_the_ranks_in_tenths_and_the_labels(seed):
    network = random_network(seed)
    data = random_data(network, size=40, seed=seed)
    labels = data.tensors[1].tolist()
    for name, filters in one_by_one(network, data).items():
        expected = []
        for rows in filters:
            means = [z.mean().item() for z, _ in rows]
            ordered = sorted(means)
            edges = [ordered[int(i / 10 * 39)] for i in range(1, 10)]
            tenths = [sum(value > edge for edge in edges) for value in means]
            expected.append(information(tenths, labels))
        scores = filter_scores(network.model, data, "mutual_information", batch_size=7)
        torch.testing.assert_close(scores[name], torch.tensor(expected, dtype=torch.float64))


def test_mutual_information_needs_integer_labels():
    network = random_network(0)
    images = random_data(network).tensors[0]
    wrong = [torch.rand(5), torch.arange(5) - 1, torch.zeros(5, 1, dtype=torch.int64)]
    datasets = [TensorDataset(images, labels) for labels in wrong]
    for data in (*datasets, [(image, {"label": 1}) for image in images]):
        with pytest.raises(ValueError, match="Mutual information needs integer labels"):
            filter_scores(network.model, data, "mutual_information")


def test_mutual_information_is_nothing_for_a_dead_filter_and_all_for_a_perfect_one():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
        model[0].bias.zero_()
    labels = torch.arange(20) % 2
    data = TensorDataset(labels.double().reshape(20, 1, 1, 1), labels)
    scores = filter_scores(model, data, "mutual_information")
    torch.testing.assert_close(scores["0"], torch.tensor([0, math.log(2)], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(6))
def test_minimum_weight_is_the_mean_square_of_the_weights(seed):
    network = random_network(seed)
    scores = filter_scores(network.model, random_data(network), "weight")
    assert list(scores) == list(network.feature_maps())
    for name, values in scores.items():
        weights = network.model.get_submodule(name).weight
        for k, value in enumerate(values):
            torch.testing.assert_close(value, mean(w**2 for w in weights[k].flatten()).detach())


def test_random_scores_follow_the_callers_seed_only():
    network = random_network(0)
    data = random_data(network)
    torch.manual_seed(5)
    first, second = (filter_scores(network.model, data, "random") for _ in range(2))
    torch.manual_seed(5)
    assert_same(filter_scores(network.model, data, "random"), first)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert all(((values >= 0) & (values < 1)).all() for values in first.values())


def small_smooth_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double()
    data = TensorDataset(torch.randn(4, 1, 5, 5).double(), torch.tensor([0, 1, 2, 0]))
    return model, data


def test_obd_is_half_the_squared_parameters_times_the_diagonal_of_the_hessian():
    model, data = small_smooth_network()
    images, labels = data.tensors
    names = ["0.weight", "0.bias", "2.weight"]
    shapes = [model.get_parameter(name).shape for name in names]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])

    def loss(flat):
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        replaced = dict(zip(names, parts, strict=True))
        return cross_entropy(torch.func.functional_call(model, replaced, images), labels)

    diagonal = torch.autograd.functional.hessian(loss, flat).diagonal()
    weight0, bias0, weight2 = (flat.square() * diagonal / 2).split(sizes)
    exact = {
        "0": weight0.reshape(2, -1).sum(1) + bias0,
        "2": weight2.reshape(2, -1).sum(1),
    }
    network = scorable(model, data)
    draws = [obd(network, data, 4, seed=seed) for seed in range(400)]
    for name, expected in exact.items():
        estimates = torch.stack([draw[name] for draw in draws])
        error = estimates.std(0) / len(draws) ** 0.5
        # Four standard errors: of four filters none is farther off by chance.
        assert ((estimates.mean(0) - expected).abs() < 4 * error + 1e-12).all()
        assert (error < expected.abs().max() / 4).all(), "too coarse to tell anything"


def test_obd_counts_the_bias_that_leaves_with_a_filter():
    model, data = small_smooth_network()
    with torch.no_grad():
        model[0].weight.zero_()
    assert (filter_scores(model, data, "obd", batch_size=4)["0"] != 0).all()


def test_obd_is_the_same_each_time_and_leaves_nothing_behind():
    model, data = small_smooth_network()
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    first = filter_scores(model, data, "obd", batch_size=3)
    assert_same(filter_scores(model, data, "obd", batch_size=3), first)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_no_criterion_leaves_anything_behind(criterion):
    network = random_network(3)
    network.model.train()
    data = random_data(network)
    before = state_of(network.model)
    filter_scores(network.model, data, criterion, batch_size=2)
    assert_same(state_of(network.model), before)


@PROPERTY
@given(SEEDS)
def test_the_oracle_is_the_change_of_the_loss_when_the_filter_is_removed(seed):
    network = random_network(seed)
    data = random_data(network, seed=seed)
    signed = oracle(network.model, data, batch_size=2)
    assert list(signed) == list(network.feature_maps())
    base, _ = evaluate(network.model, data)
    for name, changes in signed.items():
        if len(changes) > 1:
            removed = [
                remove_filters(network.model, {name: [k]}, data) for k in range(len(changes))
            ]
            expected = [evaluate(small, data)[0] - base for small in removed]
            torch.testing.assert_close(
                changes, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-12
            )
    torch.testing.assert_close(
        filter_scores(network.model, data, "oracle_abs"),
        {name: values.abs() for name, values in signed.items()},
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_means_the_same_by_name_and_as_a_function(criterion):
    network = random_network(3)
    data = random_data(network)
    assert CRITERIA[criterion].__name__ == criterion
    torch.manual_seed(0)
    by_name = filter_scores(network.model, data, criterion)
    torch.manual_seed(0)
    torch.testing.assert_close(by_name, filter_scores(network.model, data, CRITERIA[criterion]))


def test_a_function_that_returns_another_shape_is_an_error_that_says_which():
    network = random_network(0)
    with pytest.raises(ValueError, match=r"must return .*\(examples, filters\)"):
        filter_scores(network.model, random_data(network), lambda z, g: z.mean((0, 2)))


@PROPERTY
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20))
def test_normalized_scores_have_unit_norm_and_the_same_proportions(values):
    scores = torch.tensor(values)
    original = scores.clone()
    normalized = normalize({"layer": scores})["layer"]
    assert_same(scores, original)
    assert normalized.dtype == torch.float32
    if scores.max() > 1e-36:  # below, float32 has fewer digits
        expected = scores.double() / scores.double().norm()
        torch.testing.assert_close(normalized.double(), expected, rtol=1e-5, atol=1e-37)


def test_layers_are_normalized_apart_and_zeros_stay_zeros():
    scores = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(3), "c": torch.tensor([0.0, 2.0])}
    expected = {"a": torch.tensor([0.6, 0.8]), "b": torch.zeros(3), "c": torch.tensor([0.0, 1.0])}
    normalized = normalize(scores)
    assert list(normalized) == ["a", "b", "c"]
    torch.testing.assert_close(normalized, expected)


def test_tiny_scores_are_normalized_like_others():
    # Their squares are below what float32 can hold.
    normalized = normalize({"layer": torch.tensor([3e-30, 4e-30])})
    torch.testing.assert_close(normalized["layer"], torch.tensor([0.6, 0.8]))


def test_scores_of_any_size_and_kind_of_number_are_normalized():
    for size, dtype in ((1, torch.int64), (1e200, torch.float64), (1e-200, torch.float64)):
        scores = torch.tensor([3 * size, 4 * size], dtype=dtype)
        found = normalize({"layer": scores})["layer"]
        assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
        torch.testing.assert_close(found.double(), torch.tensor([0.6, 0.8]).double())
