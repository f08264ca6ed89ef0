"""What one to five ranks compute together from one to five images is what one process computes."""

import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import PROPERTY, assert_same, state_of
from ranks_in_threads import on_all
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning import evaluate, filter_scores
from cnn_pruning.criteria import CRITERIA
from cnn_pruning.experiments import ranks
from cnn_pruning.experiments.data import few_images
from cnn_pruning.experiments.progress import progress
from cnn_pruning.experiments.training import refresh_batch_norms
from cnn_pruning.oracle import oracle

FEW = settings(PROPERTY, max_examples=8)
SIZES = st.integers(1, 5)
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def network(seed=0):
    """Each rank has its own copy, as each process has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double()


def images(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(size, 1, 6, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(pixels, torch.arange(size) % 3)


MODELS = {rank: network() for rank in range(5)}  # made here: the threads would share the seed


@FEW
@given(SIZES, SIZES, SIZES, st.booleans())
def test_the_loss_is_that_of_one_process(several, size, batch_size, pooled):
    data = images(size)
    expected = evaluate(network(), data)

    def work(rank):
        part = TensorDataset(*(tensor[rank::several] for tensor in data.tensors))
        shared = ranks.pool(part) if pooled else ranks.divide(data)
        assert (len(shared), len(ranks.own(shared))) == (size, len(part) if pooled else size)
        return evaluate(MODELS[rank], shared, batch_size)

    found = on_all(several, work)
    assert_same(found, [found[0]] * several)
    assert_close(found[0], expected)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "obd"])
@pytest.mark.parametrize(("several", "size", "pooled"), [(2, 5, False), (4, 3, True)])
def test_the_scores_are_those_of_one_process(criterion, several, size, pooled):
    data = images(size)
    expected = filter_scores(network(), data, criterion)

    def work(rank):
        part = TensorDataset(*(tensor[rank::several] for tensor in data.tensors))
        shared = ranks.pool(part) if pooled else ranks.divide(data)
        return filter_scores(MODELS[rank], shared, criterion, batch_size=4)

    found = on_all(several, work)
    assert_same(found, [found[0]] * several)
    if criterion != "random":  # that of one rank
        assert_close(found[0], expected)


@FEW
@given(SIZES, SIZES, SIZES)
@example(2, 3, 5)
def test_batch_norms_get_the_statistics_of_one_process(several, size, batch_size):
    data, models = images(size), [network(0) for _ in range(several)]
    expected = network(0)
    refresh_batch_norms(expected, data, batch_size)
    if batch_size >= size > 1:  # all at once
        maps = expected[0](data.tensors[0])
        assert_close(expected[1].running_mean, maps.mean((0, 2, 3)).detach())
    on_all(several, lambda rank: refresh_batch_norms(models[rank], ranks.divide(data), batch_size))
    for model in models:
        assert_close(model.state_dict(), expected.state_dict())


def test_the_first_images_are_those_of_one_rank_also_where_a_rank_has_none():
    for has in range(3):

        def work(rank, has=has):
            part = images(4 if rank == has else 0)
            return few_images(ranks.pool(part), 2)

        assert_same(on_all(3, work), [images(4).tensors[0][:2]] * 3)


def changed(what):
    model = network()
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[what].add_(1)
    return model


@pytest.mark.parametrize("what", ["0.bias", "1.running_mean", "1.num_batches_tracked", "6.weight"])
def test_networks_that_differ_in_any_weight_or_buffer_are_refused_on_all(what):
    models = [network(), network(), changed(what)]
    data = images(4)
    for use in (evaluate, filter_scores):
        for error in on_all(3, lambda rank, use=use: use(models[rank], ranks.divide(data))):
            assert "network of rank 2 isn't that of rank 0" in str(error)


class Items(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


@pytest.mark.parametrize("kind", [lambda data: data, Items])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_data_that_differ_in_one_value_are_refused_on_all(kind, place):
    other = TensorDataset(*(tensor.clone() for tensor in images(5).tensors))
    other.tensors[0][place, 0, 3, 3] += 1e-9
    sets = [kind(images(5)), kind(other)]
    before = state_of(network())["random"]
    for error in on_all(2, lambda rank: ranks.divide(sets[rank])):
        assert isinstance(error, ranks.Refused) and "data that differ" in str(error)
    assert_same(state_of(network())["random"], before)


CALLS = {
    "batch_size is 2 on rank 0 and 3 on rank 1": lambda rank, data: evaluate(
        MODELS[rank], data, 2 + rank
    ),
    "criterion is 'taylor' on rank 0 and 'apoz' on rank 1": lambda rank, data: filter_scores(
        MODELS[rank], data, ["taylor", "apoz"][rank]
    ),
    "cost is one on rank 0 and other on rank 1": lambda rank, data: evaluate(
        MODELS[rank], data, cost=[one, other][rank]
    ),
    "cost is one on rank 0 and other": lambda rank, data: filter_scores(
        MODELS[rank], data, cost=[one, other][rank]
    ),
    "cost is one on rank 0 and other on": lambda rank, data: oracle(
        MODELS[rank], data, cost=[one, other][rank]
    ),
    "criterion is times.<locals>.criterion of [1] on rank 0": lambda rank, data: filter_scores(
        MODELS[rank], data, times([1, 100][rank])
    ),
    "filters is {'0': 3, '3': 2} on rank 0 and {'3': 2}": lambda rank, data: filter_scores(
        MODELS[rank], data, keep=[[], ["0"]][rank]
    ),
    "make different calls": lambda rank, data: [evaluate, filter_scores][rank](MODELS[rank], data),
    "Rank 1 has stopped: nothing here": lambda rank, data: evaluate(
        MODELS[rank], data, cost=[one, raises][rank]
    ),
}


def times(factor):
    def criterion(feature_map, gradient):
        return factor * feature_map.mean(2)

    return criterion


def around(inside, device):
    return lambda feature_map, gradient: (inside(feature_map, gradient), device)[0]


def one(outputs, labels):
    return outputs[:, 0]


def other(outputs, labels):
    return outputs[:, 1]


def raises(outputs, labels):
    raise OSError("nothing here")


raises.__qualname__ = "one"


@pytest.mark.parametrize("sentence", CALLS)
def test_what_ranks_do_otherwise_all_refuse_with_one_sentence(sentence):
    errors = on_all(2, lambda rank: CALLS[sentence](rank, ranks.divide(images(4))))
    assert all(isinstance(error, ranks.Refused) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert sentence in str(errors[0])
    clocks = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert all(clock.finished.is_set() for clock in clocks)


def test_functions_that_are_alike_are_the_same_on_all_ranks():
    """Each rank has objects of its own, at other places in the memory, and a GPU of its own."""
    scores = on_all(
        2,
        lambda rank: filter_scores(
            MODELS[rank], ranks.divide(images(4)), around(times(2), torch.device("cuda", rank))
        ),
    )
    for name, values in scores[0].items():
        assert values.equal(scores[1][name])


def test_what_only_one_rank_may_do_the_others_leave():
    done = []
    results = on_all(3, lambda rank: ranks.first_alone(done.append)(rank) is None)
    assert done == [0]
    assert results == [True, False, False]  # something that can stand behind ``with``


def test_one_rank_alone_shows_a_bar(monkeypatch):
    shown = {}

    @contextmanager
    def bar(total, desc, leave, disable):
        shown[dist.get_rank()] = disable
        yield SimpleNamespace(update=lambda: None)

    monkeypatch.setattr("cnn_pruning.experiments.progress.tqdm", bar)

    def work(rank):
        with progress(3, "training") as advance:
            advance()

    on_all(3, work)
    assert shown == {0: None, 1: True, 2: True}  # None: in a terminal


def test_seeds_of_ranks_are_that_of_the_first_and_others_all_different():
    for seed in (0, 7):
        found = on_all(5, lambda rank, seed=seed: ranks.seed_of_rank(seed, ranks.divide(images(2))))
        assert found[0] == seed and len({*found}) == 5
        alone = on_all(5, lambda rank, seed=seed: ranks.seed_of_rank(seed, images(2)))
        assert alone == [seed] * 5


def test_what_is_not_shared_is_done_by_each_rank_alone():
    data = images(5)

    def work(rank):
        part = TensorDataset(*(tensor[rank:] for tensor in data.tensors))
        return evaluate(MODELS[rank], part, batch_size=1 + rank), len(part)

    for (found, size), rank in zip(on_all(3, work), range(3), strict=True):
        part = TensorDataset(*(tensor[rank:] for tensor in data.tensors))
        assert size == 5 - rank
        assert_close(found, evaluate(network(), part))
