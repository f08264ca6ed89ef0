import ctypes
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from networks import PROPERTY, SEEDS, assert_same, random_network, state_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # on Windows
    resource = None

from cnn_pruning import CNN, remove_filters
from cnn_pruning.measure import buffers_kept, costs, count_macs, count_parameters, latency


def with_mixed_flags():
    model = CNN((2, 3))
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    return model


def all_but_random_numbers(model):
    return {part: value for part, value in state_of(model).items() if part != "random"}


def test_parameters_of_the_tutorials_network_are_counted_as_by_hand():
    # 9 weights a channel and a bias for each filter; 10 classes.
    by_hand = (9 + 1) * 8 + (8 * 9 + 1) * 16 + (16 * 28 * 28 + 1) * 10
    assert count_parameters(CNN((8, 16))) == by_hand == 126_698


def test_frozen_parameters_count_and_buffers_do_not():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    model.requires_grad_(False)
    assert count_parameters(model) == 4 * 9 + 4 + 4


def test_multiply_adds_of_the_tutorials_network_are_counted_as_by_hand():
    by_hand = 28 * 28 * (9 * 8 + 8 * 9 * 16) + 16 * 28 * 28 * 10
    assert count_macs(CNN((8, 16))) == by_hand == 1_085_056


def test_multiply_adds_are_half_of_the_operations_that_pytorch_counts():
    model = CNN((8, 16)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 1, 28, 28))
    assert 2 * count_macs(model) == counter.get_total_flops()


@PROPERTY
@given(SEEDS)
def test_multiply_adds_are_one_for_each_weight_at_each_place_it_is_used(seed):
    network = random_network(seed)
    layers, expected = network.model.eval(), []

    def count(layer, _, output):
        places = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        expected.append(places * layer.weight.numel())

    handles = [
        layer.register_forward_hook(count)
        for layer in layers.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network.model(torch.rand(1, *network.shape, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    assert count_macs(network.model, network.shape) == sum(expected)


@PROPERTY
@given(SEEDS)
def test_counting_multiply_adds_leaves_nothing_behind(seed):
    network = random_network(seed)
    before = all_but_random_numbers(network.model)
    count_macs(network.model, network.shape)
    assert_same(all_but_random_numbers(network.model), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("repeats", [2, 3, 30])
def test_latency_is_a_median_between_two_positive_quartiles(repeats):
    found = latency(CNN((2, 3)), CNN((1,)), batch_size=4, repeats=repeats)
    assert len(found) == 2
    for median, first, third in found:
        assert 0 < first <= median <= third


def test_latency_counts_passes_in_evaluation_mode_of_the_batch_size_asked_for():
    passes = []

    class Watched(CNN):
        def forward(self, images):
            passes.append((self.training, torch.is_grad_enabled(), tuple(images.shape)))
            return super().forward(images)

    latency(Watched((2,)).train(), batch_size=3, repeats=4)
    assert passes == [(False, False, (3, 1, 28, 28))] * (5 + 4)


class Hungry(CNN):
    """Notes how many pages the system had to map in during each pass, of 64 MiB."""

    def forward(self, images):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1)  # above glibc's own threshold: it would be mapped each time
        FAULTS.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return super().forward(images)


FAULTS = []


def resident():
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another memory allocator")
def test_latency_keeps_the_memory_of_a_pass_for_the_next_and_gives_it_back_at_the_end(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    model, before = Hungry((2,)), resident()
    FAULTS.clear()
    with pytest.raises(ValueError, match="can't take"):  # after an error too
        latency(model, batch_size=1, repeats=2, image_shape=(3, 9, 9))
    assert resident() < before + 2**25  # half of a pass's 64 MiB
    latency(model, batch_size=1, repeats=10)
    assert resident() < before + 2**25
    # Of 16,384 pages. A buffer may move in a heap that other tests have left in pieces, and is then
    # mapped anew; latencies are medians over the passes, too.
    assert statistics.median(FAULTS[5:]) < 100


def test_memory_is_left_alone_where_there_is_no_glibc_or_the_user_has_chosen(monkeypatch):
    def refuse(*_):
        raise AssertionError("the C library was asked")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(ctypes, "CDLL", refuse)
        with buffers_kept():
            pass
    for known, environment in (({}, {}), ({"mallopt": refuse}, {"MALLOC_TRIM_THRESHOLD_": "1"})):
        with monkeypatch.context() as patch:
            patch.setattr(ctypes, "CDLL", lambda _, known=known: SimpleNamespace(**known))
            for name, value in environment.items():
                patch.setenv(name, value)
            with buffers_kept():
                pass


def test_latency_does_not_count_its_warm_up(monkeypatch):
    # Passes of 1,000 s before it is warm, then of 1 s: five that aren't counted.
    clock = itertools.count()
    ticks = {2 * k + 1: 1000.0 for k in range(5)}
    now = [0.0]

    def perf_counter():
        now[0] += ticks.get(next(clock), 0.5)
        return now[0]

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    assert latency(CNN((2,)), batch_size=1, repeats=2) == [(500.0, 500.0, 500.0)]


def test_multiply_adds_of_a_layer_with_a_stride_are_those_at_the_size_of_its_output():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(100, 2))
    assert count_macs(model, (1, 10, 10)) == 9 * 4 * 5 * 5 + 100 * 2


def test_latency_leaves_the_network_as_it_was():
    model = with_mixed_flags()
    before = all_but_random_numbers(model)
    latency(model, batch_size=2, repeats=2)
    assert_same(all_but_random_numbers(model), before)
    assert torch.is_grad_enabled()


def test_flags_are_restored_when_a_forward_pass_fails():
    model = with_mixed_flags()
    flags = [module.training for module in model.modules()]
    for measure in (
        lambda: count_macs(model, (3, 28, 28)),
        lambda: latency(model, batch_size=1, repeats=2, image_shape=(3, 9, 9)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            measure()
        assert [module.training for module in model.modules()] == flags


def test_costs_name_what_a_pruned_network_has_less_of():
    model = CNN((2, 3))
    small = remove_filters(model, {"network.0": [0], "network.2": [1]})
    whole, pruned = costs(model, small)
    assert list(whole) == ["filters", "parameters", "MACs", "ms, batch 1", "ms, batch 512"]
    assert (whole["filters"], pruned["filters"]) == (5, 3)
    assert whole["parameters"] == count_parameters(model) > pruned["parameters"]
    assert whole["MACs"] == count_macs(model) > pruned["MACs"] == count_macs(CNN((1, 2)))
    assert whole["ms, batch 1"] > 0 and whole["ms, batch 512"] > 0
