import copy

import pytest
import torch
import torchinfo
from hypothesis import given
from networks import PROPERTY, SEEDS, assert_same, random_data, random_network, state_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from cnn_pruning import (
    CNN,
    evaluate,
    filter_scores,
    fit,
    mask_filters,
    remove_filters,
)
from cnn_pruning.experiments.data import batches
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.scores import normalize, select_filters


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (size,), generator=generator))


TRAIN, VAL = dataset(48), dataset(20, seed=1)
NOT_A_NUMBER = TensorDataset(VAL.tensors[0] * torch.nan, VAL.tensors[1])


def network(channels=(3, 4)):
    torch.manual_seed(0)
    return CNN(channels)


def steps(model=None, val=VAL, **options):
    options = {"updates": 2, "batch_size": 16, **options}
    return list(prune_iteratively(model or network(), TRAIN, val, **options))


@PROPERTY
@given(SEEDS)
def test_without_updates_it_is_scoring_again_after_each_removal(seed):
    net = random_network(seed)
    net.model.eval()
    data = random_data(net, size=6, seed=seed)
    total = sum(net.model.get_submodule(name).out_channels for name in net.feature_maps())
    target = max(len(net.feature_maps()), total - 2)
    removed = {name: [] for name in net.feature_maps()}
    expected = net.model
    for step in prune_iteratively(net.model, data, data, filters=target, updates=0):
        scores = filter_scores(expected, data)
        expected = remove_filters(expected, select_filters(normalize(scores), 1), data)
        refreshed_by_hand(expected, data.tensors[0])
        assert_close(dict(step.model.state_dict()), dict(expected.state_dict()))
        for layer, filters in step.removed.items():
            removed[layer] += filters
        # Indices are the original network's: with its statistics of batch norm, masking them there
        # gives the same logits.
        images = data.tensors[0]
        again = remove_filters(net.model, step.gone, data)
        assert_same(dict(again.named_parameters()), dict(step.model.named_parameters()))
        with torch.no_grad(), mask_filters(net.model, removed, images):
            torch.testing.assert_close(again(images), net.model(images))


def refreshed_by_hand(model, images):
    """Take the statistics of batch norms from one pass of all images, in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.eval().momentum = 0.1


@pytest.mark.parametrize("updates", [0, 2])
def test_after_a_removal_batch_norms_have_the_statistics_of_the_pruned_network(updates):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)]
    model = nn.Sequential(*layers).double()
    model[5].eval()
    data = TensorDataset(torch.randn(9, 1, 8, 8).double() + 1, torch.arange(9) % 3)
    before = state_of(model)
    options = {"filters": 5, "updates": updates, "batch_size": 3, "lr": 0.01}
    for step in prune_iteratively(model, data, data, **options):
        expected = copy.deepcopy(step.model).eval()
        for norm in (expected[1], expected[5]):
            norm.running_mean.fill_(9)
        refreshed_by_hand(expected, data.tensors[0])
        for i in (1, 5):
            assert_close(step.model[i].running_mean, expected[i].running_mean)
            assert_close(step.model[i].running_var, expected[i].running_var)
        assert step.val_loss == pytest.approx(evaluate(step.model, data)[0])
        flags = [m.training for m in step.model.modules()]
        assert flags == before["training"] and not flags[6]
        assert [step.model[i].momentum for i in (1, 5)] == [0.3, 0.1]
    assert_same(state_of(model), before)


def test_frozen_batch_norms_keep_their_statistics_through_all_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model[1].eval().requires_grad_(False)
    model[1].running_mean.normal_()
    data = TensorDataset(torch.randn(9, 1, 8, 8), torch.arange(9) % 3)
    for step in prune_iteratively(model, data, data, filters=2, updates=1, batch_size=3):
        assert_same(step.model[1].running_mean, model[1].running_mean[step.kept["0"]])


@pytest.mark.parametrize("options", [{}, {"updates": 0}, {"criterion": "oracle_abs"}])
def test_every_step_says_what_went_and_what_remains(options):
    model = network((4, 5))
    found = steps(model, filters=4, per_step=2, **options)
    gone = {"network.0": [], "network.2": []}
    for step, left in zip(found, (7, 5, 4), strict=True):
        for layer, filters in step.removed.items():
            assert not {*filters} & {*gone[layer]}
            gone[layer] += filters
            size = model.get_submodule(layer).out_channels
            assert sorted(step.kept[layer] + gone[layer]) == list(range(size))
        assert step.filters == left == sum(step.model.channels)
        assert {k: sorted(v) for k, v in gone.items()} == step.gone
        again = remove_filters(model, step.gone).state_dict()
        assert all(again[k].shape == v.shape for k, v in step.model.state_dict().items())
        assert step.model.channels == tuple(map(len, step.kept.values()))
        assert step.parameters == count_parameters(step.model)
        assert step.macs == count_macs(step.model)
        assert (step.val_loss, step.val_accuracy) == evaluate(step.model, VAL)


@pytest.mark.parametrize(("target", "value"), [("parameters", 20_000), ("macs", 60_000)])
def test_it_stops_at_the_first_network_that_is_small_enough(target, value):
    found = steps(network((4, 6)), **{target: value})
    sizes = [getattr(step, target) for step in found]
    assert sizes[-1] <= value < min(sizes[:-1])


def test_a_target_that_is_reached_already_takes_no_step():
    assert steps(filters=7) == []


def test_the_network_handed_in_and_those_of_earlier_steps_stay_as_they_are():
    model = network()
    before = state_of(model)
    iterator = prune_iteratively(model, TRAIN, VAL, filters=4, updates=3, batch_size=16)
    first = next(iterator)
    reached = state_of(first.model)
    next(iterator)
    iterator.close()  # stopped early
    assert_same(state_of(model) | {"random": None}, before | {"random": None})
    assert_same(state_of(first.model) | {"random": None}, reached | {"random": None})
    fit(first.model, TRAIN, VAL, epochs=1)
    assert sum(first.model.channels) == 6


def test_the_callers_random_numbers_are_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = network()
    torch.set_rng_state(before)
    steps(model, filters=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_scores_of_the_updates_are_those_of_a_pass_where_nothing_moves():
    model = network()
    (step,) = steps(model, filters=6, updates=3, lr=1e-12)  # one epoch of 48 images
    assert step.removed == select_filters(normalize(filter_scores(model, TRAIN)), 1)


def test_a_step_is_updates_of_adam_and_the_scores_are_those_of_their_own_passes():
    # With dropout, so that it shows whether a pass is one of training, and with what draws.
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(3, 2, 3), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double()
    data = TensorDataset(torch.randn(11, 1, 6, 6).double(), torch.arange(11) % 3)

    expected, seed = copy.deepcopy(model).train(), 3
    optimizer = torch.optim.Adam(expected.parameters(), 0.01)
    loader = batches(data, 4, torch.Generator().manual_seed(seed))
    effects = {"0": [], "3": []}
    torch.manual_seed(seed)
    for images, labels in loader:  # 4, 4 and 3 of them
        first = expected[:2](images)
        second = expected[2:5](first)
        losses = cross_entropy(expected[5:](second), labels, reduction="none")
        for name, z in (("0", first), ("3", second)):
            (slope,) = torch.autograd.grad(losses.sum(), z, retain_graph=True)
            effects[name].append((z * slope).mean((2, 3)).abs().detach())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()

    found = []
    options = {"updates": 3, "batch_size": 4, "lr": 0.01, "seed": seed}

    def rescore(network, scores):
        found.append((copy.deepcopy(network.state_dict()), scores))
        return normalize(scores)

    list(prune_iteratively(model, data, data, filters=4, rescore=rescore, **options))
    ((weights, scores),) = found
    # float64: rounding only
    assert_close(weights, expected.state_dict())
    assert_close(scores, {name: torch.cat(rows).mean(0) for name, rows in effects.items()})


def test_updates_train_the_network():
    (trained,) = steps(filters=6, updates=30, lr=1e-2)
    (untrained,) = steps(filters=6, updates=0)
    assert evaluate(trained.model, TRAIN)[0] < evaluate(untrained.model, TRAIN)[0]


def test_the_same_seed_gives_the_same_steps():
    first, second, other = (steps(filters=4, seed=seed) for seed in (1, 1, 2))
    for one, same in zip(first, second, strict=True):
        assert one.removed == same.removed
        assert_same(dict(one.model.state_dict()), dict(same.model.state_dict()))
    assert first[-1].val_loss != other[-1].val_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Name one budget"),
        ({"filters": 3, "macs": 9}, "Name one budget"),
        ({"filters": 1}, "keeps at least 2"),
        ({"filters": 3, "min_filters": 2}, "keeps at least 4"),
        ({"macs": 10}, "keeps at least"),
        ({"filters": 0}, "filters must be a positive integer"),
        ({"filters": 3.0}, "filters must be a positive integer"),
        ({"filters": 5, "per_step": 0}, "per_step"),
        ({"filters": 5, "updates": -1}, "updates"),
        ({"filters": 5, "keep": ["conv"]}, "keep names conv"),
        ({"filters": 2, "keep": ["network.0"]}, "keeps at least 4"),
        ({"filters": 5, "lr": 0}, "lr"),
        ({"filters": 5, "batch_size": 0}, "batch_size"),
        ({"filters": 5, "criterion": "tailor"}, "tailor"),
        (
            {"filters": 5, "val": NOT_A_NUMBER},
            "loss on the validation images is nan from the start",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(options, message):
    model = network()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        steps(model, **options)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("rescore", [None, "normalize", lambda scores: scores])
def test_a_rescore_that_is_no_function_of_two_is_refused_at_the_first_step(rescore):
    with pytest.raises(TypeError, match=r"rescore must be a function of \(network, scores\)"):
        steps(filters=5, rescore=rescore)


def test_torchinfo_counts_the_same_multiply_adds_and_the_biases_besides():
    model = CNN((8, 16))
    counted = torchinfo.summary(model, (1, 1, 28, 28), verbose=0).total_mult_adds
    assert counted == count_macs(model) + 784 * (8 + 16) + 10


def test_scores_are_compared_as_rescore_returns_them():
    model = network((2, 2))
    scores = {"network.0": torch.tensor([0.6, 0.8]), "network.2": torch.tensor([0.6, 0.8])}
    cost = {"network.0": 1.0, "network.2": 3.0}
    for weight, expected in ((0.0, "network.0"), (0.1, "network.2"), (-0.1, "network.0")):
        (step,) = steps(
            model,
            filters=3,
            updates=1,
            rescore=lambda network, _, w=weight: {k: v - w * cost[k] for k, v in scores.items()},
        )
        assert step.removed == {"network.0": [], "network.2": []} | {expected: [0]}


def test_layers_that_rescore_leaves_out_or_keep_names_lose_nothing():
    for options in (
        {"rescore": lambda network, scores: {"network.2": scores["network.2"]}},
        {"keep": ["network.0"]},
    ):
        found = steps(network((3, 4)), filters=5, **options)
        assert [step.model.channels for step in found] == [(3, 3), (3, 2)]


def test_rescore_sees_the_network_as_it_is_and_its_scores():
    seen = []

    def rescore(network, scores):
        seen.append((network.channels, {k: len(v) for k, v in scores.items()}))
        return normalize(scores)

    steps(network((3, 4)), filters=5, rescore=rescore)
    assert next(channels for channels, _ in seen) == (3, 4)
    for channels, widths in seen:
        assert widths == dict(zip(("network.0", "network.2"), channels, strict=True))
