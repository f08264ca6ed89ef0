import copy
import random

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

from cnn_pruning import CNN, filter_scores
from cnn_pruning.criteria import normalize, taylor

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
    assert filter_scores(model[2:], TensorDataset(torch.rand(2, 4, 6, 6), data.tensors[1])) == {}


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
