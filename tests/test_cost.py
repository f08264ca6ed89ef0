"""A cost of one's own takes the place of cross-entropy everywhere, and sees what is read.

The costs here are multiples of cross-entropy: what forgets them gives another number. Labels are
the numbers of the images, so a cost also notes which images a function reads, and whether to learn
from them.
"""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PROPERTY
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import CNN, TaylorPruner, evaluate, filter_scores, fit, mask_filters
from cnn_pruning.criteria import CRITERIA, taylor
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.oracle import oracle, oracle_abs

# How the scores grow with the cost; where it plays no part, as 1.
DEGREES = dict.fromkeys(CRITERIA, 0) | {"taylor_squared": 2}
for name in ("taylor", "taylor_abs_first", "taylor_abs_last", "obd", "oracle", "oracle_abs"):
    DEGREES[name] = 1


def network(seed=0, last_alone=True):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Sigmoid(), nn.Flatten()]
    end = nn.Linear(36, 3) if last_alone else nn.Sequential(nn.Linear(36, 3), nn.LogSoftmax(1))
    return nn.Sequential(*layers, end).double()


def numbered(size, first=0):
    """Images whose label is their number."""
    generator = torch.Generator().manual_seed(first)
    images = torch.rand(size, 1, 6, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.arange(first, first + size))


TRAIN, VAL = numbered(10), numbered(4, first=100)


def classes(data):
    return TensorDataset(data.tensors[0], data.tensors[1] % 3)


def times(factor):
    def cost(outputs, numbers):
        return factor * cross_entropy(outputs, numbers % 3, reduction="none")

    return cost


@pytest.mark.parametrize("last_alone", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_grow_with_the_cost(criterion, last_alone):
    model = network(last_alone=last_alone)
    torch.manual_seed(3)
    expected = filter_scores(model, classes(TRAIN), criterion, batch_size=4)
    ways = {"by name": filter_scores, "by the class": by_the_class, "by itself": by_itself}
    for way, score in ways.items():
        torch.manual_seed(3)
        data = classes(TRAIN) if criterion == "mutual_information" else TRAIN
        found = score(model, data, criterion, batch_size=4, cost=times(3.0))
        for name, values in expected.items():
            assert_close(found[name], 3.0 ** DEGREES[criterion] * values, msg=way)


def by_the_class(model, data, criterion, batch_size, cost):
    return TaylorPruner(model, criterion, cost=cost).score(data, batch_size)


def by_itself(model, data, criterion, batch_size, cost):
    functions = {"oracle": oracle, "oracle_abs": oracle_abs}
    if criterion in functions:
        return functions[criterion](model, data, batch_size, cost)
    return filter_scores(model, data, CRITERIA[criterion], batch_size, cost)


def test_the_loss_and_the_training_are_those_of_the_cost():
    model = network()
    plain, accuracy = evaluate(model, classes(VAL))
    loss, share = evaluate(model, classes(VAL), cost=times(3.0))
    assert_close((loss, share), (3 * plain, accuracy))
    rates = {"epochs": 2, "batch_size": 4, "lr": 1e-30}  # nothing moves
    expected = fit(copy.deepcopy(model), classes(TRAIN), classes(VAL), **rates)
    for row, other in zip(fit(model, TRAIN, VAL, cost=times(3.0), **rates), expected, strict=True):
        assert_close(row["train_loss"], 3 * other["train_loss"])
        assert_close(row["val_loss"], 3 * other["val_loss"])


def test_training_goes_down_the_cost_and_not_down_cross_entropy():
    one, other = network(), network()
    fit(one, TRAIN, VAL, epochs=20, batch_size=5, cost=times(-1.0))
    fit(other, TRAIN, VAL, epochs=20, batch_size=5, cost=times(1.0))
    data = classes(TRAIN)
    assert evaluate(other, data)[0] < evaluate(network(), data)[0] < evaluate(one, data)[0]


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("criterion", ["taylor", "oracle", "obd", taylor])
def test_every_step_is_scored_trained_and_evaluated_by_the_cost(criterion, updates):
    scores = {1.0: [], 3.0: []}
    losses = {}
    for factor in scores:

        def rescore(_, found, factor=factor):
            scores[factor].append(copy.deepcopy(found))
            return found

        steps = prune_iteratively(
            *(network(), TRAIN, VAL),
            filters=5,
            updates=updates,
            lr=1e-30,
            criterion=criterion,
            rescore=rescore,
            cost=times(factor),
        )
        losses[factor] = torch.tensor([step.val_loss for step in steps])
    assert_close(losses[3.0], 3 * losses[1.0])
    for one, three in zip(scores[1.0], scores[3.0], strict=True):
        for name, values in one.items():
            assert_close(three[name], 3 * values)


class Tokens(nn.Module):
    """Its last layer is linear in the channels at each place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(1, 3, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)).flatten(2).mT)


def test_the_oracle_of_a_network_that_puts_out_tokens_is_that_of_the_masked_one():
    def cost(outputs, numbers):
        return outputs.square().sum((1, 2))

    model = Tokens().double()
    base, _ = evaluate(model, TRAIN, cost=cost)
    for k, change in enumerate(filter_scores(model, TRAIN, "oracle", cost=cost)["conv"]):
        with mask_filters(model, {"conv": [k]}, TRAIN):
            masked, _ = evaluate(model, TRAIN, cost=cost)
        assert_close(change.item(), masked - base)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3)
        self.heads = nn.ModuleList([nn.Linear(48, 3), nn.Linear(32, 3)])

    def forward(self, x):
        maps = torch.tanh(self.one(x)).flatten(1), torch.tanh(self.other(x)).flatten(1)
        return tuple(head(z) for head, z in zip(self.heads, maps, strict=True))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_filters_that_a_cost_does_not_depend_on_are_named_and_score_0(used):
    def cost(outputs, numbers):
        return sum(times(1.0)(outputs[i], numbers) for i in used)

    names = ("one", "other")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = filter_scores(TwoHeads().double(), TRAIN, cost=cost)
    for i, name in enumerate(names):
        assert (scores[name] != 0).all() if i in used else (scores[name] == 0).all()
    said = [str(each.message) for each in caught]
    unused = [name for i, name in enumerate(names) if i not in used]
    assert said == [f"The cost doesn't depend on {name}: these filters score 0." for name in unused]


def test_a_schedule_names_the_filters_that_its_cost_does_not_depend_on():
    def cost(outputs, numbers):
        return times(1.0)(outputs[0], numbers)

    with pytest.warns(UserWarning, match="The cost doesn't depend on other: these filters score 0"):
        steps = [*prune_iteratively(TwoHeads().double(), TRAIN, TRAIN, filters=4, cost=cost)]
    assert steps[-1].removed["other"] == [0] or steps[-1].removed["other"] == [1]


# What is read


class Noted:
    """A cost that notes the numbers of the images, apart for those that are learned from."""

    def __init__(self):
        self.learned, self.seen = [], []

    def __call__(self, outputs, numbers):
        (self.learned if outputs.requires_grad else self.seen).append(numbers.tolist())
        return times(1.0)(outputs, numbers)


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("criterion", ["taylor", "oracle", "obd"])
def test_scoring_between_removals_reads_all_of_train_and_never_val(criterion):
    cost = Noted()
    steps = list(
        prune_iteratively(
            network(), TRAIN, VAL, filters=4, updates=0, criterion=criterion, cost=cost
        )
    )
    val = {*VAL.tensors[1].tolist()}
    assert len(steps) == 3
    assert not val & {*flat(cost.learned)}
    if criterion == "oracle":
        read = [number for number in flat(cost.seen) if number not in val]
        # Once as they are, and once without each filter there is: 7, 6 and 5.
        assert sorted(read) == sorted([*range(10)] * (8 + 7 + 6))
    else:
        assert flat(cost.learned) == [*range(10)] * 3
    evaluated = [number for number in flat(cost.seen) if number in val]
    assert evaluated == VAL.tensors[1].tolist() * 4  # at the start, and after each removal


@pytest.mark.parametrize("updates", [0, 2])
def test_batch_norms_get_the_statistics_of_train_and_not_of_val(updates):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)]
    model = nn.Sequential(*layers).double()
    val = TensorDataset(9 + VAL.tensors[0], VAL.tensors[1])
    for step in prune_iteratively(
        model, TRAIN, val, filters=1, updates=updates, batch_size=5, cost=times(1.0)
    ):
        with torch.no_grad():
            maps = step.model[0](TRAIN.tensors[0])
        assert_close(step.model[1].running_mean, maps.mean((0, 2, 3)))
        assert_close(step.model[1].running_var, maps.var((0, 2, 3)))


@settings(PROPERTY, max_examples=6)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_the_updates_of_all_steps_go_on_through_the_epochs(updates, batch_size, seed):
    cost = Noted()
    options = {"updates": updates, "batch_size": batch_size, "seed": seed, "cost": cost}
    list(prune_iteratively(network(), TRAIN, VAL, filters=4, **options))
    assert len(cost.learned) == 3 * updates
    epoch = -(-10 // batch_size)  # in mini-batches
    for start in range(0, 3 * updates, epoch):
        shown = flat(cost.learned[start : start + epoch])
        assert len({*shown}) == len(shown)
        if start + epoch <= 3 * updates:
            assert {*shown} == {*range(10)}
    again = Noted()
    list(prune_iteratively(network(), TRAIN, VAL, filters=4, **options | {"cost": again}))
    assert again.learned == cost.learned


@pytest.mark.parametrize(("side", "count"), [(6, 300), (160, 40)])
def test_pieces_hold_each_image_once_in_their_order(side, count):
    """Also where the maps of a single image are large: 3 · 160² · 8 bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(3, 3)),
    ).double()
    images = torch.rand(1, 1, side, side, dtype=torch.float64).expand(count, -1, -1, -1)
    data = TensorDataset(images, torch.arange(count))
    for use in (
        lambda cost: filter_scores(model, data, batch_size=count, cost=cost),
        lambda cost: evaluate(model, data, batch_size=count, cost=cost),
    ):
        cost = Noted()
        use(cost)
        pieces = cost.learned or cost.seen
        assert flat(pieces) == [*range(count)]
        assert max(map(len, pieces)) <= (32 if side > 6 and cost.learned else 300)


class Reads(Dataset):
    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.read.append(i)
        return self.data[i]


def test_training_reads_train_to_learn_and_all_of_val_after_each_epoch():
    train, val, cost = Reads(TRAIN), Reads(VAL), Noted()
    fit(network(), train, val, epochs=3, batch_size=4, cost=cost)
    assert flat(cost.seen) == VAL.tensors[1].tolist() * 4  # before the first, too
    learned = [flat(cost.learned)[start : start + 10] for start in (0, 10, 20)]
    assert len(flat(cost.learned)) == 30
    assert all(sorted(epoch) == [*range(10)] for epoch in learned)
    assert learned[0] != learned[1] != learned[2]
    assert val.read == [0, 1, 2, 3] * 4


def test_reading_a_dataset_takes_no_more_than_its_items():
    """Once each for the scores, and the first ones to read the network from."""
    data = Reads(classes(TRAIN))
    filter_scores(network(), data, batch_size=3)
    assert data.read[-10:] == [*range(10)]
    assert {*data.read[:-10]} <= {0, 1}


def test_the_network_of_the_tutorial_learns_by_the_cost_too():
    images = torch.rand(6, 1, 28, 28)
    data = TensorDataset(images, torch.arange(6))
    model = CNN((2,))
    before = evaluate(model, data)[0]
    rows = fit(model, data, data, epochs=5, batch_size=3, cost=times(-1.0))
    assert evaluate(model, data)[0] > before
    assert rows[-1]["val_loss"] < -before
