"""What the sentences of notebooks 1 to 4 say is what their cells printed, or what can be tried."""

import re

import pandas as pd
import torch
from long_runs import seeds
from saved_notebooks import number, printed, prose, tables
from scipy.stats import spearmanr
from torch import nn

# 1 · The criterion


def means():
    """The columns of the notebook's table of means over the examples."""
    (table,) = tables("01")
    return {column: [*values.values()] for column, values in table.items()}


def test_the_size_of_the_slopes_orders_the_filters_and_their_mean_misses_the_change():
    change, slope, size = (means()[c] for c in ("true change", "-y", "|y|"))
    assert spearmanr(size, change).statistic > 0.8
    assert sum(slope) < sum(change) / 2
    costliest = change.index(max(change))
    assert slope[costliest] < change[costliest] / 5, "the tangent ends far too low"
    half = means()["curvature / 2"]
    assert change[costliest] > half[costliest], "closing a gate is a large step"


def test_for_one_filter_the_tangent_gives_most_of_the_change():
    change, slope = (means()[c] for c in ("true change", "-y"))
    assert slope[7] > change[7] / 2 > 0.001


def test_the_squares_are_a_sixth_to_a_third_below_the_curvature():
    for a, b in zip(means()["y² / 2"], means()["curvature / 2"], strict=True):
        rounding = 0.001
        assert 2 / 3 * b - rounding <= a <= 5 / 6 * b + rounding


def test_the_estimate_misses_most_in_size_where_much_and_in_proportion_where_little_changes():
    change, size = (means()[c] for c in ("true change", "|y|"))
    live = [k for k, each in enumerate(size) if each > max(size) / 100]
    costliest, cheapest = (way(live, key=lambda k: change[k]) for way in (max, min))
    missed = {k: abs(size[k] - change[k]) for k in live}
    assert max(missed, key=missed.get) == costliest
    assert missed[cheapest] <= 1.1 * min(missed.values()) + 0.001
    assert size[costliest] < change[costliest]
    assert size[cheapest] > 5 * change[cheapest]


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


def test_the_spread_of_ten_seeds_is_that_of_the_table():
    found = pd.read_csv(seeds.TABLE, comment="#")
    accuracy = 100 * found[found.network == "baseline"].test_accuracy
    assert len(accuracy) == 10
    said = [f"{value:.2f}" for value in (accuracy.min(), accuracy.max(), accuracy.std())]
    worst, best, spread = said
    assert f"the worst has {worst}% and the best {best}%" in prose("02")
    assert f"their standard deviation is {spread} points" in prose("02")


# 3 · Filter scores


LIMITS = "by chance, 95% lie within ±"


def test_only_what_chance_seldom_does_is_said_of_the_maps_of_a_low_score():
    table = tables("03")[0]
    for values, filters in zip(table.values(), (8, 16), strict=True):
        assert abs(values[LIMITS] - 1.96 / (filters - 1) ** 0.5) < 0.01, "to both sides"
        assert values["contrast (standard deviation)"] > values[LIMITS]
    first, second = table["first layer"], table["second layer"]
    for name in ("size of the gradient", "mean activation"):
        assert second[name] > second[LIMITS]
    assert first["contrast (standard deviation)"] < 1.2 * first[LIMITS], "barely"
    others = first.keys() - {LIMITS, "contrast (standard deviation)"}
    assert all(abs(first[name]) < first[LIMITS] for name in others), "of these nothing is said"


def test_normalizing_changes_some_choices():
    assert re.search(r"choose differently for n = \d", printed("03"))


def test_the_layer_alone_tells_much_and_the_scores_order_the_second_layer():
    name = "03"
    for kind in ("raw", "normalized"):
        assert number(name, rf"filters, {kind}: ([\d.]+)") > number(
            name, r"the layer alone: ([\d.]+)"
        )
    alone, chance = (number(name, rf"the layer alone: {p}") for p in (r"([\d.]+)", r".*< ([\d.]+)"))
    assert alone > 1.5 * chance
    assert alone > number(name, r"filters, raw: ([\d.]+)") / 2, "most of the correlation"
    assert number(name, r"Within the second layer, 16 filters: ([\d.]+)") > 0.9
    first, its_chance = (
        number(name, rf"Within the first layer, 8 filters: {p}")
        for p in (r"([\d.]+)", r".*< ([\d.]+)")
    )
    assert first < its_chance, "eight filters are too few to tell"


def test_a_few_hundred_images_are_enough():
    assert number("03", r"With 256 images the rank correlation is ([\d.]+)") > 0.95


def test_two_filters_are_opposed_in_loss_and_accuracy_by_more_than_chance():
    accuracy, loss = zip(
        *re.findall(r"accuracy ([-+.\d]+) points, loss ([-+.\d]+) nats", printed("03")), strict=True
    )
    assert float(accuracy[0]) < float(accuracy[1]) - 0.5  # "a few tenths"
    assert float(loss[0]) < float(loss[1])


# 4 · Pruning


class Sum(nn.Module):
    """Two convolutions whose maps are added; of the second, only the maps ``kept`` are there."""

    def __init__(self, kept: list[int] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 5, 1)
        self.kept = kept

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        if self.kept is None:
            return self.head(left + right)
        kept = torch.tensor(self.kept)
        return self.head(left.index_add(1, kept, right))


def test_a_filter_of_a_sum_can_leave_alone_by_index_add_and_that_saves_little():
    whole, small, kept = Sum(), Sum([0, 1, 2, 4, 5, 6, 7]), [0, 1, 2, 4, 5, 6, 7]
    for parameter in ("weight", "bias"):
        values = getattr(whole.right, parameter).detach()
        setattr(small.right, parameter, nn.Parameter(values[kept]))
    images = torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        cut = small(images)
        whole.right.weight[3], whole.right.bias[3] = 0, 0  # no activation behind it
        torch.testing.assert_close(cut, whole(images))
    gone = sum(p.numel() for p in Sum().parameters()) - sum(p.numel() for p in small.parameters())
    both = gone + Sum().left.weight[3].numel() + 1 + 5  # and the column of the head
    assert gone < both / 2
    assert "only leave together" not in prose("04")


def test_taylor_keeps_more_than_any_of_the_random_choices():
    taylor = number("04", r"filters gone: Taylor ([\d.]+)%")
    assert taylor > number("04", r"random .*to ([\d.]+)%\)")
