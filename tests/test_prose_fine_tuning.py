"""What notebook 5 says in words, held against what it shows and against its tables.

If one of these fails, a sentence has to change.
"""

import math
import re

import pandas as pd
from long_runs import lengths, seeds
from saved_notebooks import printed, prose, tables
from scipy.stats import t

NUMBER = r"([-+]?\d+\.\d+)"
TABLE = pd.read_csv(lengths.TABLE, comment="#")
TESTED = {(what, length): gaps for what, length, gaps in lengths.tested(TABLE)}
OTHERS = (lengths.RANDOM, lengths.SAME_EPOCHS, lengths.SAME_COMPUTE)


def numbers(pattern):
    """The groups of the one place in what the notebook printed that matches, as floats."""
    (found,) = re.findall(pattern, printed("05"))
    return [float(each) for each in ([found] if isinstance(found, str) else found)]


def interval(values, tests=1):
    half = t.ppf(1 - 0.025 / tests, len(values) - 1) * values.std() / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def accuracies(column="test_accuracy"):
    found = pd.read_csv(seeds.TABLE, comment="#")
    return 100 * found.pivot(index="seed", columns="network", values=column)


def test_over_30_percent_of_the_parameters_are_gone():
    (table,) = [table for table in tables("05") if "test accuracy" in table]
    sizes = list(table["parameters"].values())
    assert sizes[1] < 0.7 * sizes[0]


def test_fine_tuning_brings_the_accuracy_back():
    before, without = numbers(rf"accuracy: {NUMBER}% before, {NUMBER}% without")
    first, last = numbers(rf"{NUMBER}% after one epoch of fine-tuning, {NUMBER}% after")
    assert without < first < last
    assert last > before - 0.5
    difference, error = numbers(rf"fine-tuned minus baseline: {NUMBER} ± {NUMBER}")
    assert difference + error > -0.5


def test_over_ten_baselines_it_is_above_its_start_and_below_the_whole_network_trained_on():
    by_seed = accuracies()
    tuned = by_seed["fine-tuned"]
    assert interval(tuned - by_seed["baseline"], 2)[0] > 0
    assert interval(tuned - by_seed["baseline, more epochs"], 2)[1] < 0


def test_on_validation_images_both_differences_are_less_than_half_as_large_and_not_shown():
    for other in ("baseline", "baseline, more epochs"):
        on = {}
        for column in ("test_accuracy", "val_accuracy"):
            by_seed = accuracies(column)
            on[column] = by_seed["fine-tuned"] - by_seed[other]
        assert abs(on["val_accuracy"].mean()) < abs(on["test_accuracy"].mean()) / 2
        low, high = interval(on["val_accuracy"], 2)
        assert low < 0 < high


def test_the_longer_the_training_the_less_it_matters_which_filters_went():
    leads = [TESTED[lengths.RANDOM, length] for length in (1, 5, 10)]
    means = [lead.mean() for lead in leads]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1 and 0.1 < means[-1] < 0.6  # "more than a point", "a few tenths"
    (change,) = [gaps for what, _, gaps in lengths.tested(TABLE) if "change" in what]
    assert interval(change, lengths.TESTS)[0] > 0


def taylor_minus(other, share):
    """Points of test accuracy, by seed and length."""
    of_share = TABLE[(TABLE.share == share) & TABLE.method.isin((lengths.TAYLOR, other))]
    columns = ["method", "length"]
    accuracy = 100 * of_share.pivot(index="seed", columns=columns, values="test_accuracy")
    return accuracy[lengths.TAYLOR] - accuracy[other]


def test_with_half_of_the_multiply_adds_the_lead_over_random_filters_is_gone_after_ten_epochs():
    leads = taylor_minus(lengths.RANDOM, 0.5)
    assert leads.mean().is_monotonic_decreasing
    low, high = interval(leads[10])
    assert low < 0 < high and abs(leads[10].mean()) < 0.1


def test_filters_by_weights_end_ahead_on_eight_of_ten_and_on_nine_with_half_of_the_multiply_adds():
    gaps = {share: taylor_minus(lengths.WEIGHT, share)[10] for share in (0.25, 0.5)}
    assert {share: (each < 0).sum() for share, each in gaps.items()} == {0.25: 8, 0.5: 9}
    assert all(-0.5 < each.mean() < 0 for each in gaps.values())  # README: "a little higher"


def test_an_epoch_of_the_baseline_costs_as_much_as_four_to_five_of_the_small_network():
    small = TABLE[TABLE.share != 0.5]
    macs = small.groupby(["seed", "method"]).macs.first().unstack()
    times = macs["baseline"] / macs[lengths.TAYLOR]
    assert 4 < times.min() and times.max() < 5


def test_the_picture_s_text_names_what_its_lines_do():
    rows = 100 * TABLE[TABLE.share == 0.25].groupby(["method", "length"]).test_accuracy.mean()
    taylor, random, weight, epochs, compute = (
        rows[method]
        for method in (
            lengths.TAYLOR,
            lengths.RANDOM,
            lengths.WEIGHT,
            lengths.SAME_EPOCHS,
            lengths.SAME_COMPUTE,
        )
    )
    lead = taylor - random
    assert lead.is_monotonic_decreasing and lead.iloc[0] > 1 and 0 < lead.iloc[-1] < 0.6
    assert (taylor - weight).abs().max() < 0.4
    assert (epochs < taylor).all()
    first = compute.iloc[0]
    assert compute.is_monotonic_decreasing
    assert first > max(m.iloc[0] for m in (taylor, random, weight, epochs))


def test_from_scratch_with_as_many_epochs_no_difference_is_shown():
    for length in (1, 5, 10):
        low, high = interval(TESTED[lengths.SAME_EPOCHS, length], lengths.TESTS)
        assert low < 0 < high


def test_with_as_many_multiply_adds_a_lead_of_scratch_is_not_shown_and_its_lag_is():
    leads = {length: TESTED[lengths.SAME_COMPUTE, length] for length in (1, 10)}
    assert (leads[1] < 0).sum() == 8 and interval(leads[1], lengths.TESTS)[1] > 0, "not shown"
    assert (leads[10] > 0).all() and interval(leads[10], lengths.TESTS)[0] > 0, "shown"


def test_a_longer_training_from_scratch_ends_below_a_shorter_one_with_every_baseline():
    rows = TABLE[(TABLE.share == 0.25) & (TABLE.length == 10)]
    epochs, *accuracies = (
        rows.pivot(index="seed", columns="method", values=column)
        for column in ("epochs", "val_accuracy", "test_accuracy")
    )
    assert {*epochs[lengths.SAME_EPOCHS]} == {15}
    assert {*epochs[lengths.SAME_COMPUTE]} == {32, 33}
    for found in accuracies:
        assert (found[lengths.SAME_COMPUTE] < found[lengths.SAME_EPOCHS]).all()
    every = TABLE[TABLE.method == lengths.SAME_COMPUTE].epochs
    assert (every.min(), every.max()) == (23, 33)


def test_in_the_table_of_seeds_the_whole_network_gets_more_images_right():
    of_seed = accuracies().loc[1]
    more = 100 * (of_seed["baseline, more epochs"] - of_seed["fine-tuned"])  # of 10,000 images
    assert f"the whole network gets {more:.0f} of 10,000 images more right" in prose("05")


def test_its_table_has_the_differences_of_the_long_run():
    (shown,) = [table for table in tables("05") if "points" in table and len(table["points"]) > 2]
    told = [float(re.match(NUMBER, words)[1]) for words in shown["points"].values()]
    expected = [gaps.mean() for *_, gaps in lengths.tested(TABLE)]
    assert len(told) == len(expected)
    assert all(abs(a - b) < 0.0051 for a, b in zip(told, expected, strict=True))
