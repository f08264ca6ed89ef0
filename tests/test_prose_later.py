"""What the sentences and titles of notebooks 4, 5 and 6 say holds for what these notebooks print.

The mathematics is asserted in the notebooks themselves. Here is what depends on the numbers of a
run, or of the table of several seeds: if one of these fails, a sentence has to change.
"""

import math
import re

import pandas as pd
import pytest
from saved_notebooks import printed, tables
from scipy.stats import t

from cnn_pruning.experiments.paths import ROOT

SEEDS = pd.read_csv(ROOT / "notebooks" / "long_runs" / "seeds.csv", comment="#")
NUMBER = r"([-+]?\d+\.\d+)"


def numbers(pattern, number):
    """The groups of the one place in what the notebook printed that matches, as floats."""
    (found,) = re.findall(pattern, printed(number))
    return [float(each) for each in ([found] if isinstance(found, str) else found)]


def accuracies(split):
    return 100 * SEEDS.pivot(index="seed", columns="network", values=split)


# Notebook 4


def test_without_seven_filters_taylor_keeps_more_than_the_best_random_order():
    pattern = (
        rf"Taylor {NUMBER}%, weight {NUMBER}%,\nrandom {NUMBER}% \(from {NUMBER}% to {NUMBER}%"
    )
    taylor, weight, mean, _, best = numbers(pattern, "04")
    assert taylor > best, "the title says that it matters which filters go"
    assert weight > mean


# Notebook 5


def final_table():
    """By network: its parameters and its test accuracy in percent."""
    (table,) = [table for table in tables("05") if "test accuracy" in table]
    both = table["parameters"].items(), table["test accuracy"].values()
    return {name: (size, accuracy) for (name, size), accuracy in zip(*both, strict=True)}


def test_over_30_percent_of_the_parameters_are_gone():
    table = final_table()
    assert table["fine-tuned"][0] < 0.7 * table["baseline"][0]


def test_the_run_in_the_notebook_is_like_the_one_of_its_seed_in_the_table():
    by_seed = accuracies("test_accuracy")
    spread = by_seed.std().max()  # another machine rounds differently, as another seed would
    table = final_table()
    assert {"baseline", "fine-tuned", "scratch, same epochs"} <= table.keys()
    for name, (_, accuracy) in table.items():
        if name in by_seed and name != "pruned":  # only fine-tuned networks were tested
            assert abs(accuracy - by_seed.loc[1, name]) < 4 * spread, name


def test_fine_tuning_brings_the_accuracy_back_to_within_half_a_point():
    by_seed = accuracies("test_accuracy")
    assert by_seed["baseline"].mean() > 90
    gap = by_seed["fine-tuned"] - by_seed["baseline"]
    margin = t.ppf(0.975, len(gap) - 1) * gap.std() / math.sqrt(len(gap))
    assert gap.mean() - margin > -0.5
    before, without = numbers(rf"accuracy: {NUMBER}% before, {NUMBER}% without", "05")
    first, last = numbers(rf"{NUMBER}% after one epoch of fine-tuning, {NUMBER}% after", "05")
    assert without < first < last
    assert last > before - 0.5
    difference, error = numbers(rf"fine-tuned against baseline: {NUMBER} ± {NUMBER}", "05")
    assert difference + error > -0.5


def test_longer_training_overfits_a_little():
    before, after = numbers(rf"training loss was {NUMBER} nats, now it is {NUMBER};", "05")
    assert before < after


def test_the_intervals_of_notebook_5_are_those_of_the_table():
    (intervals,) = [table for table in tables("05") if table.keys() == {"test", "validation"}]
    for column, split in (("test", "test_accuracy"), ("validation", "val_accuracy")):
        by_seed = accuracies(split)
        for other in by_seed.columns.difference(["fine-tuned", "pruned"]):
            pair = by_seed["fine-tuned"] - by_seed[other]
            margin = t.ppf(0.975, len(pair) - 1) * pair.std() / math.sqrt(len(pair))
            told = intervals[column][other]
            mean, plain, corrected = (float(found) for found in re.findall(NUMBER, told))
            assert mean == pytest.approx(pair.mean(), abs=0.0051)
            assert plain == pytest.approx(margin, abs=0.0051)
            assert corrected > plain


# Notebook 6


def test_for_most_rivals_no_difference_is_shown_and_the_lead_over_obd_is_at_the_border():
    told = re.findall(rf"taylor - (\S+) .*?{NUMBER} ± {NUMBER}: (.+)", printed("06"))
    assert len(told) == 12
    assert sum(verdict == "not shown" for *_, verdict in told) > len(told) / 2
    obd = [(float(mean), float(margin)) for name, mean, margin, _ in told if name == "obd"]
    assert all(0 < mean < 1.5 * margin for mean, margin in obd)


def test_hardly_a_filter_lowers_the_loss_by_leaving():
    (negative,) = numbers(r"removal lowers the loss: (\d+);", "06")
    assert negative <= 4  # of 120


def test_raw_scores_correlate_better_than_normalized_ones_and_about_as_the_true_ratio():
    raw, normalized, true = (
        numbers(rf"mean ρ, {name}: {NUMBER}", "06")[0]
        for name in ("raw", "normalized", "at the true ratio")
    )
    assert normalized < true < raw, "the text says that the true ratio isn't the best either"
    assert abs(raw - true) < (raw - normalized) / 2, "the title says that raw is near the top"
    lower, all_networks = numbers(r"lowers ρ in (\d+) of (\d+) networks", "06")
    assert lower == all_networks


def test_raw_scores_see_a_part_of_the_true_ratio_of_the_layers():
    true, raw = (
        [float(x) for x in re.search(rf"{name}: +([\d., ]+)", printed("06"))[1].split(",")]
        for name in ("oracle-abs", "raw Taylor")
    )
    (fixed,) = numbers(rf"normalized Taylor: {NUMBER} in every", "06")
    assert len(true) == len(raw) > 2
    assert all(large > part > fixed for large, part in zip(true, raw, strict=True))


def test_eq_8_settles_within_a_few_hundred_images_and_sums_that_cancel_do_not():
    (table,) = [table for table in tables("06") if "taylor_abs_last" in table]
    rows = {size: {name: table[name][str(size)] for name in table} for size in (256, 1024)}
    assert rows[256]["taylor"] > 0.9
    assert rows[1024]["taylor_abs_last"] < 0.8
    assert rows[256]["activation_mean"] > rows[256]["taylor"], "the mean settles earlier"


def test_eq_8_correlates_better_than_activation_or_gradient_alone():
    rho = {
        name: float(value)
        for name, value in re.findall(
            rf"^(\S.*?) +per layer .*all, raw {NUMBER} ±", printed("06"), re.M
        )
    }
    assert len(rho) == 4
    assert max(rho, key=rho.get) == "Eq. 8"
