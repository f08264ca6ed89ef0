"""What notebook 9 says in words, held against the tables of its long runs and the package."""

import ast
import re

import pandas as pd
import pytest
from long_runs import own_network, residual
from saved_notebooks import prose
from scipy.stats import t

from cnn_pruning.experiments.paths import ROOT

LEAST = min(residual.SHARES)
COLLAPSE = ["weight", "Torch-Pruning's magnitude"]


@pytest.fixture(scope="module")
def chain():
    return pd.read_csv(own_network.TABLE, comment="#")


@pytest.fixture(scope="module")
def baselines():
    table = pd.read_csv(residual.TABLE, comment="#")
    return table[table.method == "baseline"]


@pytest.fixture(scope="module")
def pruned():
    table = pd.read_csv(residual.TABLE, comment="#")
    return table[table.method != "baseline"]


# The chain


def test_an_eighth_of_the_multiply_adds_costs_about_a_point(chain):
    ends = chain[chain.test_accuracy.notna()]
    taylor, whole = (
        ends[ends.method == m].set_index("seed") for m in ("taylor, fine-tuned", "baseline")
    )
    assert 8 * taylor.macs.mean() < whole.macs.mean()
    assert 0.5 < 100 * (whole.test_accuracy - taylor.test_accuracy).mean() < 1.5


@pytest.fixture(scope="module")
def tests(chain):
    ends = chain[chain.test_accuracy.notna()]
    return 100 * ends.pivot(index="seed", columns="method", values="test_accuracy")


def interval(gaps, comparisons):
    half = t.ppf(1 - 0.025 / comparisons, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5
    return gaps.mean() - half, gaps.mean() + half


@pytest.mark.parametrize("other", ["baseline", own_network.MORE_EPOCHS])
def test_pruning_this_far_costs_accuracy_also_beside_longer_training(tests, other):
    gaps = tests["taylor, fine-tuned"] - tests[other]
    assert interval(gaps, len(own_network.TESTED))[1] < 0


@pytest.mark.parametrize("other", own_network.TESTED[2:5])
def test_no_difference_is_shown_to_other_networks_of_its_size(tests, other):
    low, high = interval(tests["taylor, fine-tuned"] - tests[other], len(own_network.TESTED))
    assert low < 0 < high


def test_fifty_epochs_from_scratch_end_below_ten_and_below_taylors_network(tests):
    long = tests[own_network.SAME_COMPUTE]
    assert (long < tests[own_network.SAME_EPOCHS]).all(), "with every seed"
    assert interval(tests["taylor, fine-tuned"] - long, len(own_network.TESTED))[0] > 0


def test_random_filters_of_all_layers_fall_behind_on_the_way_and_end_close(chain, tests):
    ends, way = chain[chain.test_accuracy.notna()], chain[chain.test_accuracy.isna()]
    mean = way.groupby(["method", "share"]).val_accuracy.mean()
    assert (mean["taylor"] - mean["random"]).min() > 0
    low, high = interval(tests["taylor, fine-tuned"] - tests["random, fine-tuned"], 1)
    assert low < 0 < high < 1
    macs = ends.groupby("method").macs.mean()
    assert macs["random, fine-tuned"] < macs["taylor, fine-tuned"]


def test_the_controls_are_what_the_text_says(chain):
    ends = chain[chain.test_accuracy.notna()].set_index(["method", "seed"])
    widths, epochs = ends.widths, ends.epochs
    taylor = widths["taylor, fine-tuned"]
    scratch = own_network.SAME_EPOCHS, own_network.SAME_COMPUTE
    for same in (f"{own_network.SAME_LAYERS}, fine-tuned", *scratch):
        assert (widths[same] == taylor).all(), same
    assert (widths["random, fine-tuned"] != taylor).all()
    assert (epochs[own_network.SAME_EPOCHS] == 10).all()
    assert epochs[own_network.SAME_COMPUTE].between(45, 55).all(), "about fifty"


# The residual network


@pytest.mark.parametrize("share, part", [(0.75, 0.45), (0.5, 0.15)])
def test_stale_statistics_are_a_part_of_the_cost_and_methods_end_close_together(
    pruned, baselines, share, part
):
    means = pruned[pruned.share == share].groupby("method").mean(numeric_only=True)
    lost = baselines.val_before.mean() - means.val_before
    back = (means.val_refreshed - means.val_before) / lost
    assert back.min() > part, "about half or more"
    assert share > 0.5 or back.max() < 0.45, "less"
    assert means.val_accuracy.max() - means.val_accuracy.min() < 0.02


def test_one_shot_down_to_the_smallest_size_is_too_far_for_every_score(pruned, baselines):
    means = pruned[pruned.share == LEAST].groupby("method").mean(numeric_only=True)
    right = means.val_accuracy
    assert (right < baselines.val_before.mean() - 0.02).all(), "points below the baseline"
    assert right[COLLAPSE].max() < 0.5 < right.drop(COLLAPSE).min()
    tests = 100 * pruned[pruned.share == LEAST].pivot(
        index="seed", columns="method", values="test_accuracy"
    )
    for chance in ("random", residual.SAME_WIDTHS):
        gaps = tests["taylor"] - tests[chance]
        low, high = interval(gaps, len(residual.TESTED) * len(residual.SHARES))
        assert low < 0 < high, "Taylor isn't shown to be better than chance"


def test_new_statistics_alone_do_not_put_taylor_ahead(pruned):
    fresh = pruned.groupby(["share", "method"]).val_refreshed.mean()
    assert len(fresh[0.75]) == 7 and fresh[0.75].idxmin() == "taylor"
    random = fresh[0.5]["random"], fresh[0.5][residual.SAME_WIDTHS]
    assert fresh[0.5]["taylor"] < min(random)
    after = pruned[pruned.share == LEAST].pivot(
        index="seed", columns="method", values="val_accuracy"
    )
    assert after.mean().idxmax() == "random"
    assert (after["random"] > after["taylor"]).sum() == 4


@pytest.mark.parametrize("method", COLLAPSE)
def test_where_weights_decide_some_layers_of_the_smallest_networks_keep_one_filter(pruned, method):
    small = pruned[(pruned.share == LEAST) & (pruned.method == method)]
    for widths in small.widths:
        assert min(map(int, widths.split("-"))) == 1


def test_every_error_that_the_notebook_explains_is_one_that_the_package_raises():
    table = prose("09").partition("| it says |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(explained) >= 5
    trees = [ast.parse(path.read_text()) for path in (ROOT / "cnn_pruning").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words = [node.value for node in nodes if isinstance(node.value, str)]
    for phrase in explained:
        assert any(phrase in text for text in words), phrase
