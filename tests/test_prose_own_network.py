"""What notebook 9 says in words, held against the tables of its long runs and the package."""

import ast
import re

import pandas as pd
import pytest
from long_runs import own_network, residual
from saved_notebooks import prose
from scipy.stats import t

from cnn_pruning.experiments.paths import ROOT

ENDS = {"weight, fine-tuned", "random, fine-tuned", "scratch, same epochs"}
LEAST = min(residual.SHARES)


def interval(table, column, one, other):
    """The 95 % t-interval for the mean of the paired differences, in points."""
    by_seed = 100 * table.pivot(index="seed", columns="method", values=column)
    gaps = by_seed[one] - by_seed[other]
    half = t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5
    return gaps.mean() - half, gaps.mean() + half


def holds_zero(low_high):
    return low_high[0] <= 0 <= low_high[1]


@pytest.fixture(scope="module")
def chain():
    return pd.read_csv(own_network.TABLE, comment="#")


@pytest.fixture(scope="module")
def pruned():
    table = pd.read_csv(residual.TABLE, comment="#")
    return table[table.method != "baseline"]


def test_an_eighth_of_the_multiply_adds_costs_some_accuracy_and_less_than_a_point(chain):
    ends = chain[chain.test_accuracy.notna()].set_index("method")
    taylor, whole = ends.loc["taylor, fine-tuned"], ends.loc["baseline"]
    assert (8 * taylor.macs < whole.macs.max()).all()
    assert whole.test_accuracy.mean() - taylor.test_accuracy.mean() < 0.01
    low, high = interval(ends.reset_index(), "test_accuracy", "taylor, fine-tuned", "baseline")
    assert low < high < 0


@pytest.mark.parametrize("other", sorted(ENDS))
def test_after_fine_tuning_no_difference_is_shown_between_the_small_networks(chain, other):
    ends = chain[chain.test_accuracy.notna()]
    assert holds_zero(interval(ends, "test_accuracy", "taylor, fine-tuned", other))


def test_random_filters_fall_behind_on_the_way_down(chain):
    way = chain[chain.test_accuracy.isna()]
    mean = way.pivot_table(index="share", columns="method", values="val_accuracy")
    small = mean[mean.index <= 0.5]
    assert len(small) >= 3
    assert (small["random"] < small[["taylor", "weight"]].min(axis=1)).all()


@pytest.mark.parametrize("column", ["val_before", "test_accuracy"])
@pytest.mark.parametrize("share", residual.SHARES)
def test_the_order_of_sum_and_absolute_value_makes_no_difference_that_is_shown(
    pruned, share, column
):
    size = pruned[pruned.share == share]
    assert holds_zero(interval(size, column, "taylor", "sum of absolute scores"))


@pytest.mark.parametrize("share", residual.SHARES)
def test_torch_prunings_taylor_is_ahead_only_at_the_largest_size_before_fine_tuning(pruned, share):
    size, other = pruned[pruned.share == share], "Torch-Pruning's Taylor"
    before = interval(size, "val_before", "taylor", other)
    assert before[1] < 0 if share == max(residual.SHARES) else holds_zero(before)
    assert holds_zero(interval(size, "test_accuracy", "taylor", other))


def test_one_shot_down_to_the_smallest_size_is_too_far_for_every_score(pruned):
    table = pd.read_csv(residual.TABLE, comment="#")
    unpruned = table[table.method == "baseline"].val_before.mean()
    smallest = pruned[pruned.share == LEAST].groupby("method")
    right, filters = smallest.val_accuracy.mean(), smallest.filters.mean()
    assert (right < unpruned - 0.05).all()
    assert right["weight"] < 0.3 < right.drop("weight").min()
    assert right["random"] >= right["taylor"]
    assert (filters.idxmin(), filters.idxmax()) == ("weight", "random")


def test_every_error_that_the_notebook_explains_is_one_that_the_package_raises():
    table = prose("09").partition("| it says |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(explained) >= 5
    trees = [ast.parse(path.read_text()) for path in (ROOT / "cnn_pruning").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words = [node.value for node in nodes if isinstance(node.value, str)]
    for phrase in explained:
        assert any(phrase in text for text in words), phrase
