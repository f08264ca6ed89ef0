"""What notebook 7 says in words, held against the tables of its long run."""

import itertools

import numpy
import pandas as pd
import pytest
from long_runs import schedules
from scipy.stats import t

FULL = {"filters": 24, "parameters": 126_698, "macs": 1_085_056}
METHODS = [*schedules.CRITERIA, schedules.SAME_LAYERS]


@pytest.fixture(scope="module")
def way():
    return pd.read_csv(schedules.WAY, comment="#")


@pytest.fixture(scope="module")
def gaps():
    """Test accuracy of Taylor minus that of the others, in points, by share and seed."""
    points = pd.read_csv(schedules.POINTS, comment="#")
    tested = points[points.share < 1].pivot(
        index=["share", "seed"], columns="method", values="test_accuracy"
    )
    return 100 * tested.rsub(tested["taylor"], axis=0).drop(columns="taylor")


def interval(values, tests=1):
    quantile = t.ppf(1 - 0.025 / tests, len(values) - 1)
    half = quantile * numpy.std(values, ddof=1) / len(values) ** 0.5
    return numpy.mean(values) - half, numpy.mean(values) + half


def over_sizes(gaps, other):
    """The mean over the sizes, in the interval that holds with those of all the others."""
    return interval(gaps[other].groupby("seed").mean(), len(gaps.columns))


def test_from_scratch_with_equal_compute_is_ahead_and_with_equal_epochs_not(gaps):
    assert (gaps["scratch, same compute"] < 0).groupby("share").sum().ge(8).all()
    assert over_sizes(gaps, "scratch, same compute")[1] < 0
    assert over_sizes(gaps, "scratch, same epochs")[1] > 0


def test_the_small_network_trained_long_beats_the_whole_one_trained_on():
    points = pd.read_csv(schedules.POINTS, comment="#")
    tested = points.pivot(index="seed", columns=["method", "share"], values="test_accuracy")
    whole = tested["baseline, more epochs", 1.0]
    small = tested["scratch, same compute"].mean(axis=1)
    assert interval(small - whole)[0] > 0


def test_after_an_epoch_taylors_filters_are_better_than_random_ones_of_the_same_layers(gaps):
    ahead = (gaps[schedules.SAME_LAYERS] > 0).groupby("share").sum()
    assert ahead.ge(8).all()
    assert over_sizes(gaps, schedules.SAME_LAYERS)[0] > 0


def test_no_difference_to_one_shot_is_shown_and_its_signs_are_opposite(gaps):
    low, high = over_sizes(gaps, "one shot, same compute")
    assert low < 0 < high
    ahead = (gaps["one shot, same compute"] > 0).groupby("share").sum()
    assert ahead[0.75] == 8
    assert (gaps["one shot, same compute"] < 0).groupby("share").sum()[0.25] == 8


def test_one_shot_trains_less_only_where_the_schedule_spent_less_than_half_an_epoch():
    points = pd.read_csv(schedules.POINTS, comment="#")
    points = points.set_index(["method", "share", "seed"]).sort_index()
    once, loop = (points.compute[m] for m in ("one shot, same compute", "taylor"))
    assert (once[0.75] < loop[0.75]).all()
    assert (points.epochs["one shot, same compute", 0.75] == 1).all()
    assert abs(once[0.25] - loop[0.25]).max() < 0.15


def test_before_fine_tuning_the_criteria_lie_7_to_13_points_apart():
    points = pd.read_csv(schedules.POINTS, comment="#")
    rows = points[points.method.isin(METHODS)].groupby(["share", "method"])
    spans = 100 * rows.val_before.mean().groupby("share").agg(lambda v: v.max() - v.min())
    assert 7 <= spans.min() and spans.max() < 13


def test_taylor_loses_to_the_oracle_only_where_the_collapse_counts(way):
    ahead = accuracy(way, "oracle", "filters", 0.1) - accuracy(way, "taylor", "filters", 0.1)
    assert interval(ahead)[0] > 0
    for x, least in itertools.product(FULL, (0.1, 0.25, 0.5)):
        if (x, least) != ("filters", 0.1):
            ours, theirs = (accuracy(way, m, x, least) for m in ("taylor", "oracle"))
            assert interval(theirs - ours)[0] < 0


def test_fine_tuning_shrinks_the_range_of_the_criteria():
    points = pd.read_csv(schedules.POINTS, comment="#")
    rows = points[points.method.isin(METHODS)].groupby(["share", "method"])
    means = rows[["val_before", "val_accuracy"]].mean().groupby("share")
    spans = means.max() - means.min()
    assert (spans.val_accuracy < spans.val_before / 3).all()


def accuracy(way, method, x, least):
    """By baseline, the mean accuracy (%) over shares of ``x`` from ``least`` to 95%."""
    shares = numpy.linspace(least, 0.95, 100)
    paths = [path.sort_values("filters") for _, path in way[way.method == method].groupby("seed")]
    found = [numpy.interp(shares, path[x] / FULL[x], path.val_accuracy) for path in paths]
    return 100 * numpy.mean(found, axis=1)


@pytest.mark.parametrize("least", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("x", FULL)
def test_the_choice_within_the_layers_is_worth_something_on_every_axis_and_range(way, x, least):
    taylor, chance = (accuracy(way, m, x, least) for m in ("taylor", schedules.SAME_LAYERS))
    assert interval(taylor - chance)[0] > 0
    assert interval(taylor - accuracy(way, "random", x, least))[0] > 0


def test_the_first_updates_in_between_bring_most_of_the_gain(way):
    from long_runs import updates

    others = pd.read_csv(updates.TABLE, comment="#")
    seeds, methods = others.seed.unique(), others.method.unique()
    both = pd.concat([others, way[way.seed.isin(seeds) & way.method.isin(methods)]])
    mean = both.pivot_table(index="method", columns="updates", values="val_accuracy")
    assert (mean[10] - mean[0] > 0.7 * (mean[100] - mean[0])).all()
