"""Numbers that are coarse, and values that are unusual: what is computed from them isn't.

A network may put out bfloat16; sums over positions, images and classes are made of at least
float32, so an error of one value in 256 stays one in 256, however many values are added.
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import PROPERTY, assert_same
from torch import nn
from torch.utils.data import TensorDataset

from cnn_pruning import (
    CNN,
    evaluate,
    filter_scores,
    mask_filters,
    normalize,
    remove_filters,
)
from cnn_pruning.criteria import CRITERIA, MeanOverExamples
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.oracle import oracle
from cnn_pruning.scores import select_filters

COARSE = [torch.bfloat16, torch.float16, torch.float32]
DIFFERENCES = ("oracle", "oracle_abs", "obd")  # of numbers that are larger than they are
# Mutual information depends on which of two means is the larger: nothing is said of its rounding.
NAMES = [name for name in CRITERIA if name not in ("random", "mutual_information")]


def network(dtype, seed=0):
    """Weights and images are the same numbers in every dtype: those of bfloat16."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))
    return model.to(torch.bfloat16).to(dtype)


def images_of(size, dtype):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 1, 8, 8, generator=generator).to(torch.bfloat16).to(dtype)
    return TensorDataset(images, torch.randint(3, (size,), generator=generator))


def rounding(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_those_of_float64_up_to_the_rounding_of_the_network(criterion, dtype):
    size = 40 if criterion in DIFFERENCES else 600  # as many as bfloat16 can't count
    allowed = rounding(dtype)
    if criterion in DIFFERENCES:
        allowed = max(16 * allowed, 128 * rounding(torch.float32))
    found = [
        filter_scores(network(d), images_of(size, d), criterion, batch_size=size)
        for d in (dtype, torch.float64)
    ]
    for values, exact in zip(*(scores.values() for scores in found), strict=True):
        assert (values.dtype, exact.dtype) == (torch.float32, torch.float64)
        assert (values - exact).abs().max() < allowed * exact.abs().max()


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("criterion", ["taylor", "activation_std", "apoz"])
def test_the_size_of_the_batches_does_not_matter_to_coarse_numbers_either(criterion, dtype):
    small, large = (
        filter_scores(network(dtype), images_of(300, dtype), criterion, batch_size=size)
        for size in (6, 300)
    )
    for name, values in small.items():
        assert (values - large[name]).abs().max() < rounding(dtype) * values.abs().max()


@pytest.mark.parametrize("dtype", COARSE)
def test_the_loss_of_coarse_logits_is_exact(dtype):
    model, data = network(dtype).eval(), images_of(600, dtype)
    images, labels = data.tensors
    with torch.no_grad():  # in pieces as here, because coarse sums inside depend on them
        logits = torch.cat([model(part) for part in images.split(128)]).double()
        masked = remove_filters(model, {"0": [1]})
        changed = torch.cat([masked(part) for part in images.split(128)]).double()

    def mean_loss(logits):
        return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean().item()

    loss, accuracy = evaluate(model, data)
    assert loss == pytest.approx(mean_loss(logits), rel=1e-6)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    change = oracle(model, data, batch_size=128)["0"][1]
    assert change.dtype == torch.float64
    coarse = 0 if dtype == torch.float32 else rounding(dtype) / 4  # of a sum without one channel
    assert change.item() == pytest.approx(mean_loss(changed) - mean_loss(logits), abs=coarse + 1e-6)


def test_under_mixed_precision_a_criterion_is_given_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    seen = []

    def criterion(z, gradient):
        seen.append((z.dtype, gradient.dtype, torch.equal(z, z.bfloat16().float())))
        return (z * gradient).mean(2).abs()

    torch.manual_seed(0)
    data = TensorDataset(torch.rand(8, 1, 28, 28), torch.arange(8))
    list(prune_iteratively(CNN((2, 3)), data, data, filters=4, updates=1, criterion=criterion))
    assert set(seen) == {(torch.float32, torch.float32, True)}


@PROPERTY
@given(
    st.sampled_from([torch.float64, *COARSE, torch.int64, torch.int32]),
    st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    st.sampled_from([1, 1e-3, 1e3]),
)
def test_normalized_scores_keep_dtype_signs_and_order(dtype, numbers, scale):
    values = (torch.tensor(numbers) * (scale if dtype.is_floating_point else 1)).to(dtype)
    before = values.clone()
    found = normalize({"a": values, "b": -values.abs() - 1})
    assert_same(values, before)
    for name, given_ in (("a", values), ("b", -values.abs() - 1)):
        exact = given_.double()
        expected = exact / (torch.linalg.vector_norm(exact) or 1)
        assert found[name].dtype == (dtype if dtype.is_floating_point else torch.float32)
        error = (found[name].double() - expected).abs().max()
        assert error <= rounding(found[name].dtype)
    assert (found["b"] < 0).all()
    left = select_filters({"a": values}, len(values) - 1)["a"]
    assert len(left) == len(values) - 1
    (stays,) = {*range(len(values))} - {*left}
    assert values[stays] == values.max()


# Values that no filter should have, and some have


def broken(value):
    """Filter 1 of the first layer puts out ``value`` everywhere."""
    model = network(torch.float64).eval()
    with torch.no_grad():
        model[0].bias[1] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_mask_hides_a_map_that_is_not_finite(value):
    model, data = broken(value), images_of(5, torch.float64)
    images = data.tensors[0]
    whole = network(torch.float64).eval()
    with torch.no_grad():
        with mask_filters(model, {"0": [1]}):
            masked = model(images)
        with mask_filters(whole, {"0": [1]}):
            assert_same(masked, whole(images))
        assert masked.isfinite().all()
        torch.testing.assert_close(remove_filters(model, {"0": [1]})(images), masked)


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_filter_whose_maps_are_not_finite_is_never_selected(criterion, value):
    model = broken(value)
    model[1] = nn.Tanh() if math.isnan(value) else nn.Identity()
    with torch.no_grad():
        model[0].weight[1] = value
    scores = filter_scores(model, images_of(4, torch.float64), criterion)
    if criterion == "apoz":  # counts
        assert all(values.isfinite().all() for values in scores.values())
        return
    with pytest.raises(ValueError, match=r"scores that are not finite"):
        select_filters(normalize(scores), 1)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e4])
def test_a_map_that_is_constant_has_no_deviation_and_tells_nothing(value):
    model = network(torch.float64)
    model[1] = nn.Identity()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, value
    data = images_of(30, torch.float64)
    deviation = filter_scores(model, data, "activation_std", batch_size=7)["0"]
    assert deviation[1] == pytest.approx(0, abs=1e-7 * abs(value))
    assert (deviation[[0, 2]] > 0.01).all()
    told = filter_scores(model, data, "mutual_information", batch_size=7)["0"]
    assert told[1] == pytest.approx(0, abs=1e-12)
    assert filter_scores(model, data, "apoz")["0"][1] == (value > 0)


@pytest.mark.parametrize("dtype", [*COARSE, torch.float64])
@pytest.mark.parametrize("sharp", [1.0, 1e4])
def test_probabilities_are_told_from_logits_also_with_exact_zeros(dtype, sharp):
    model = network(dtype)
    data = images_of(6, dtype)

    class Probable(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = copy.deepcopy(model)

        def forward(self, x):
            return (sharp * self.inside(x)).softmax(1)

    if sharp > 1:
        assert (Probable()(data.tensors[0]) == 0).any()
    for use in (lambda m: evaluate(m, data), lambda m: filter_scores(m, data)):
        with pytest.raises(ValueError, match="outputs are probabilities"):
            use(Probable())


def test_the_mean_over_examples_is_summed_in_float64():
    """2^24 + 1 is the first integer that float32 doesn't have."""
    mean = MeanOverExamples(lambda z, _: z[..., 0])
    mean.add({"layer": (torch.tensor([2.0**24, 1.0]).view(2, 1, 1), None)})
    mean.add({"layer": (torch.tensor([1.0, 0.0]).view(2, 1, 1), None)})
    assert mean.scores(nn.Identity(), TensorDataset(torch.zeros(4)))["layer"].item() == 2**22 + 0.5
