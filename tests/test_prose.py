"""What the sentences of notebooks 1 to 3 say is what their cells printed."""

import re

import pytest
from saved_notebooks import number, printed, tables
from scipy.stats import spearmanr

# 1 · The criterion


def test_the_size_of_the_slopes_orders_the_filters_and_their_mean_misses_the_change():
    means, curvatures = tables("01")
    change, slope, size = (list(means[c].values()) for c in ("true change", "-y", "|y|"))
    assert spearmanr(size, change).statistic > 0.8
    assert sum(slope) < sum(change) / 2
    costliest = change.index(max(change))
    assert slope[costliest] < change[costliest] / 5, "the tangent ends far too low"
    half = list(curvatures["curvature / 2"].values())
    assert change[costliest] > half[costliest], "closing a gate is a large step"


def test_the_squares_with_real_labels_are_near_the_curvature():
    _, curvatures = tables("01")
    half, drawn, real = (
        list(curvatures[c].values())
        for c in ("curvature / 2", "y² / 2, network's labels", "y² / 2, real labels")
    )
    assert drawn == pytest.approx(half, abs=0.0011)
    for a, b in zip(half, real, strict=True):
        assert a / 2 - 0.001 <= b <= 2 * a + 0.001


# 2 · Training


def test_the_network_is_as_good_as_with_every_seed_that_was_tried():
    assert number("02", r"Test accuracy ([\d.]+)%") > 88


def test_trousers_are_easy_to_tell_and_shirts_are_not():
    said = printed("02")
    assert "Best: Trouser" in said
    assert re.search(r"Worst: Shirt, [\d.]+% right, most often taken for (T-shirt|Pull|Coat)", said)


def test_most_mistakes_are_among_four_tops():
    assert number("02", r"among T-shirts, pullovers, coats and shirts: (\d+)%") > 50


def test_the_training_loss_can_be_the_higher_one():
    history = tables("02")[0]
    assert history["train_loss"]["1"] > history["val_loss"]["1"]


def test_the_validation_loss_levels_off_and_the_training_loss_does_not():
    history = tables("02")[0]
    val, train = ([history[key][str(e)] for e in (4, 5)] for key in ("val_loss", "train_loss"))
    assert abs(val[0] - val[1]) < (train[0] - train[1]) / 3


def test_the_address_shows_the_runs_at_once_and_the_name_tells_them_apart():
    said = printed("02")
    assert re.search(r"http://127\.0\.0\.1:5000/#/experiments/\d+/runs\n", said)
    name = re.search(r"The run is called: (.*)", said)[1]
    for part in ("channels 8-16", "seed 1", "epochs 5"):
        assert part in name
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", name)


# 3 · Filter scores


def test_the_maps_of_a_low_score_are_flat_and_the_second_layer_has_small_gradients_too():
    table = tables("03")[0]
    for layer, filters in (("network.0", 8), ("network.2", 16)):
        chance = 1.645 / (filters - 1) ** 0.5
        assert table[layer]["contrast (standard deviation)"] > chance
        assert abs(table[layer]["share of positions lit"]) < chance
    assert table["network.2"]["size of the gradient"] > 0.7
    assert table["network.0"]["size of the gradient"] < 0.4


def test_normalizing_changes_some_choices_though_not_the_seven_lowest():
    said = printed("03")
    assert "Among the 7 lowest, 0 filters differ." in said
    assert re.search(r"choose differently for n = \d", said)
    norms = [float(value) for value in re.findall(r"norm ([\d.e-]+),", said)]
    assert norms[0] > norms[1]


def test_the_layer_alone_tells_much_and_the_scores_order_the_second_layer():
    name = "03"
    for kind in ("raw", "normalized"):
        assert number(name, rf"filters, {kind}: ([\d.]+)") > number(
            name, r"the layer alone: ([\d.]+)"
        )
    alone, chance = (number(name, rf"the layer alone: {p}") for p in (r"([\d.]+)", r".*< ([\d.]+)"))
    assert alone > 1.5 * chance
    assert alone > number(name, r"filters, raw: ([\d.]+)") / 2, "most of the correlation"
    assert number(name, r"Within network.2, 16 filters: ([\d.]+)") > 0.9
    first, its_chance = (
        number(name, rf"Within network.0, 8 filters: {p}") for p in (r"([\d.]+)", r".*< ([\d.]+)")
    )
    assert first < its_chance, "eight filters show no relation"


def test_a_few_hundred_images_are_enough():
    assert number("03", r"With 256 images the rank correlation is ([\d.]+)") > 0.95


def test_no_filter_makes_the_training_loss_worse():
    assert number("03", r"Filters without which the training loss falls: (\d+)") == 0
