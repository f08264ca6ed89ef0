"""What the sentences and titles of notebooks 4, 6 and 8 say holds for what these notebooks print.

The mathematics is asserted in the notebooks themselves. Here is what depends on the numbers of a
run, or of the table of several seeds: if one of these fails, a sentence has to change.
"""

import re

from saved_notebooks import printed, tables

NUMBER = r"([-+]?\d+\.\d+)"


def numbers(pattern, number):
    """The groups of the one place in what the notebook printed that matches, as floats."""
    (found,) = re.findall(pattern, printed(number))
    return [float(each) for each in ([found] if isinstance(found, str) else found)]


# Notebook 4


def test_without_seven_filters_taylor_keeps_more_than_the_best_random_order():
    pattern = (
        rf"Taylor {NUMBER}%, weights {NUMBER}%,\nrandom {NUMBER}% \(from {NUMBER}% to {NUMBER}%"
    )
    taylor, weight, mean, _, best = numbers(pattern, "04")
    assert taylor > best, "the title says that it matters which filters go"
    assert weight > mean


# Notebook 6


def comparisons():
    """(rival, way): Taylor's lead, half of its interval, on how many networks it is ahead."""
    (table,) = [table for table in tables("06") if "all, raw: higher on" in table]
    for way in ("all, raw", "all, normalized"):
        for name, told in table[way].items():
            mean, margin = map(float, re.fullmatch(rf"{NUMBER} ± {NUMBER}", told).groups())
            ahead = table[f"{way}: higher on"][name]
            yield name.removeprefix("Taylor - "), way, mean, margin, ahead


BEHIND = {  # what the text says of the rivals
    *(("absolute value last", way) for way in ("all, raw", "all, normalized")),
    *(("mean activation", way) for way in ("all, raw", "all, normalized")),
    *(("spread of activations", way) for way in ("all, raw", "all, normalized")),
    *(("zeros (APoZ)", way) for way in ("all, raw", "all, normalized")),
    *(("mutual information", way) for way in ("all, raw", "all, normalized")),
    *(("curvature (OBD), random signs", way) for way in ("all, raw", "all, normalized")),
    ("weights", "all, normalized"),
    ("absolute value first", "all, normalized"),
}


def test_the_text_names_the_rivals_that_are_shown_to_rank_worse_than_taylor():
    found = list(comparisons())
    assert len(found) == 20
    assert {(name, way) for name, way, mean, margin, _ in found if mean > margin} == BEHIND
    (said,) = numbers(r"20 comparisons: (\d+) show Taylor ahead, 0 behind", "06")
    assert said == len(BEHIND)


def test_eq_8_is_ahead_of_the_absolute_value_last_on_every_network():
    last = [ahead for name, *_, ahead in comparisons() if name == "absolute value last"]
    assert last == ["10 of 10"] * 2


def test_hardly_a_filter_lowers_the_loss_by_leaving():
    (negative,) = numbers(r"removal lowers the loss: (\d+);", "06")
    assert negative <= 8  # of 240


def test_raw_scores_correlate_better_than_normalized_ones_and_about_as_the_true_ratio():
    raw, normalized, true = (
        numbers(rf"mean ρ, {name}: {NUMBER}", "06")[0]
        for name in ("raw", "normalized", "at the true ratio")
    )
    assert normalized < true
    assert abs(raw - true) < (raw - normalized) / 2, "the title says that raw is near the top"
    lower, all_networks = numbers(r"lowers ρ in (\d+) of (\d+) networks", "06")
    assert lower == all_networks


def test_raw_scores_see_a_part_of_the_true_ratio_of_the_layers():
    oracle, raw = (
        numbers(rf"{name} +{NUMBER} to {NUMBER}, median (\d+)", "06")
        for name in ("the oracle", "raw Taylor")
    )
    (fixed,) = numbers(rf"normalized {NUMBER} in every", "06")
    assert fixed < min(raw) and max(raw[:2]) < min(oracle[:2])


def test_neither_raw_nor_normalized_scores_choose_better_on_most_networks():
    better, of = numbers(r"Raw has the lower loss on (\d+) of (\d+) networks", "06")
    assert 0.2 < better / of < 0.8


def test_random_signs_come_near_the_exact_curvature_only_in_great_number():
    (table,) = [table for table in tables("06") if "ρ with the exact scores" in table]
    errors = table["error"]
    assert errors["1"] > 2 * errors["16"] > 4 * errors["256"]


def test_eq_8_settles_within_a_few_hundred_images_and_sums_that_cancel_do_not():
    (table,) = [t for t in tables("06") if {"absolute value last", "mean activation"} <= t.keys()]
    rows = {size: {name: table[name][str(size)] for name in table} for size in (256, 1024)}
    assert rows[256]["Taylor, Eq. 8"] > 0.9
    assert rows[256]["curvature (OBD), exact"] > 0.9, "OBD needs few images"
    assert rows[1024]["absolute value last"] < 0.9
    assert rows[1024]["curvature (OBD), random signs"] < rows[256]["curvature (OBD), exact"]
    assert rows[256]["mean activation"] > rows[256]["Taylor, Eq. 8"], "the mean settles earlier"


# Notebook 8


def test_fine_tuning_shrinks_the_range_of_choices_to_about_a_seventh():
    before, after = numbers(r"mean: (\d+) points before, (\d+\.\d) after", "08")
    assert 6 < before / after < 8


def test_the_best_choice_before_fine_tuning_is_not_shown_to_lead_after_it():
    lead, half = numbers(rf"best choice minus Taylor's, after: {NUMBER} ± {NUMBER} points", "08")
    assert lead < half, "looking harder for the optimum bought nothing"
