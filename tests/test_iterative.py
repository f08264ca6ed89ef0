import copy

import pytest
import torch
import torchinfo
from hypothesis import given
from networks import PROPERTY, SEEDS, assert_same, random_data, random_network, state_of
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from cnn_pruning import CNN, TaylorPruner, evaluate, fit, mask_filters, remove_filters, schedules
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.savings import map_flops, saved_macs, saved_parameters


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (size,), generator=generator))


TRAIN, VAL = dataset(48), dataset(20, seed=1)


def network(channels=(3, 4)):
    torch.manual_seed(0)
    return CNN(channels)


def steps(model=None, **options):
    options = {"updates": 2, "batch_size": 16, **options}
    return list(prune_iteratively(model or network(), TRAIN, VAL, **options))


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
    for step in prune_iteratively(
        net.model, data, data, filters=target, updates=0, image_shape=net.shape
    ):
        pruner = TaylorPruner(expected)
        pruner.score(data)
        expected = pruner.prune(1)
        assert_same(dict(step.model.state_dict()), dict(expected.state_dict()))
        for layer, filters in step.removed.items():
            removed[layer] += filters
        # Indices are the original network's: masking them there gives the same logits.
        images = data.tensors[0]
        with torch.no_grad(), mask_filters(net.model, removed):
            torch.testing.assert_close(step.model(images), net.model(images))


@pytest.mark.parametrize("options", [{}, {"score_batches": 1}, {"criterion": "oracle"}])
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
    pruner = TaylorPruner(model)
    pruner.score(TRAIN)
    assert step.removed == pruner.select(1)


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
        ({}, "Name one target"),
        ({"filters": 3, "macs": 9}, "Name one target"),
        ({"filters": 1}, "keeps at least 2"),
        ({"filters": 3, "min_filters": 2}, "keeps at least 4"),
        ({"macs": 10}, "keeps at least"),
        ({"filters": 0}, "filters must be a positive integer"),
        ({"filters": 3.0}, "filters must be a positive integer"),
        ({"filters": 5, "per_step": 0}, "per_step"),
        ({"filters": 5, "updates": -1}, "updates"),
        ({"filters": 5, "score_batches": 0}, "score_batches"),
        ({"filters": 5, "lr": 0}, "lr"),
        ({"filters": 5, "batch_size": 0}, "batch_size"),
        ({"filters": 5, "criterion": "tailor"}, "tailor"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(options, message):
    model = network()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        steps(model, **options)
    assert_same(state_of(model), before)


def test_random_like_taylor_takes_other_filters_of_the_same_layers():
    model = network((6, 8))

    def layers(steps):
        return [layer for step in steps for layer, filters in step.removed.items() if filters]

    like = list(schedules.schedule(model, TRAIN, VAL, "taylor", 1, seed=0))
    control = list(schedules.schedule(model, TRAIN, VAL, "random, like taylor", 1, 0, like))
    assert layers(control) == layers(like)
    assert [step.removed for step in control] != [step.removed for step in like]
    assert control[-1].model.channels == (1, 1)


# What a removal saves


def test_the_papers_flops_are_those_of_its_formula():
    # 2 H W (C K K + 1) for 28 x 28 inputs
    assert map_flops(CNN((8, 16))) == {
        "network.0": 2 * 784 * (9 + 1) / 1e6,
        "network.2": 2 * 784 * (8 * 9 + 1) / 1e6,
    }


@PROPERTY
@given(SEEDS)
def test_savings_are_what_the_counters_say_before_minus_after(seed):
    net = random_network(seed)

    def flops(model):
        image = torch.zeros(1, *net.shape, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model).eval()(image)
        return counter.get_total_flops()

    macs, parameters = saved_macs(net.model, net.shape), saved_parameters(net.model)
    for layer in macs:
        small = remove_filters(net.model, {layer: [0]})
        assert macs[layer] == pytest.approx((flops(net.model) - flops(small)) / 2e6)
        fewer = sum(p.numel() for p in net.model.parameters()) - sum(
            p.numel() for p in small.parameters()
        )
        assert parameters[layer] == pytest.approx(fewer / 1e6)


def test_torchinfo_counts_the_same_multiply_adds_and_the_biases_besides():
    model = CNN((8, 16))
    counted = torchinfo.summary(model, (1, 1, 28, 28), verbose=0).total_mult_adds
    assert counted == count_macs(model) + 784 * (8 + 16) + 10


def test_a_cost_is_subtracted_from_the_scores_with_its_weight():
    model = network((2, 2))
    scores = {"network.0": torch.tensor([0.6, 0.8]), "network.2": torch.tensor([0.6, 0.8])}

    def cost(model):
        return {"network.0": 1.0, "network.2": 3.0}

    for weight, expected in ((0.0, "network.0"), (0.1, "network.2"), (-0.1, "network.0")):
        pruner = TaylorPruner(model, cost=cost, cost_weight=weight)
        pruner.scores = scores
        assert pruner.select(1)[expected] == [0]


@pytest.mark.parametrize("options", [{"cost_weight": 0.1}, {"cost_weight": float("nan")}])
def test_a_weight_without_a_cost_is_refused(options):
    with pytest.raises(ValueError, match="cost_weight"):
        TaylorPruner(network(), **options)
