"""The repairs of notebook 10, and what it says about several networks."""

import pandas as pd
import pytest
import torch
from long_runs import least_squares, repair
from scipy.stats import t
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from cnn_pruning import CNN, remove_filters

STRENGTH = 0.1
NOTHING = 1e-6  # a strength so small that little but least squares is left


def images(number, seed=0):
    return torch.rand(number, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def dataset(number, seed=0):
    labels = torch.randint(10, (number,), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images(number, seed), labels)


def network(channels=(3, 4), seed=0):
    torch.manual_seed(seed)
    return CNN(channels)


def without(whole, first=(), second=()):
    """The network without these filters, and those of the second convolution that stay."""
    removed = {"network.0": [*first], "network.2": [*second]}
    kept = [k for k in range(whole.channels[1]) if k not in second]
    return remove_filters(whole, removed), removed, kept


def error(small, whole, some):
    with torch.no_grad():
        return mse_loss(small(some), whole(some)).item()


def assert_same_logits(one, other, some, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(one(some), other(some), **tolerance)


# Ridge regression


@pytest.fixture(params=[(60, 9), (9, 60), (12, 12)], ids=["many rows", "few rows", "square"])
def problem(request):
    rows, columns = request.param
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (columns, 3))
    return x + 2, y - 1  # with means of their own


def test_the_derivative_of_the_ridge_is_zero(problem):
    x, y = problem
    weight, bias = least_squares.ridge(x, y, STRENGTH)
    rest, centered = y - x @ weight.T - bias, x - x.mean(0)
    strength = STRENGTH * centered.square().sum(1).mean()
    torch.testing.assert_close(centered.T @ rest, strength * weight.T)
    torch.testing.assert_close(rest.mean(0), torch.zeros(3, dtype=x.dtype))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_weights_make_the_sum_of_error_and_ridge_smaller(problem, seed):
    x, y = problem
    weight, bias = least_squares.ridge(x, y, STRENGTH)
    strength = STRENGTH * (x - x.mean(0)).square().sum(1).mean()

    def total(weight, bias):
        return (y - x @ weight.T - bias).square().sum() + strength * weight.square().sum()

    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1.0):
        others = [p + size * torch.randn(p.shape, generator=generator) for p in (weight, bias)]
        assert total(*others) > total(weight, bias)


def test_without_a_ridge_the_rest_is_orthogonal_to_what_is_known():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (7, 2))
    weight, bias = least_squares.ridge(x, y, 0.0)
    assert ((x - x.mean(0)).T @ (y - x @ weight.T - bias)).abs().max() < 1e-10


def test_an_infinitely_strong_ridge_leaves_only_the_means_to_the_bias(problem):
    x, y = problem
    weight, bias = least_squares.ridge(x, y, 1e12)
    assert weight.abs().max() < 1e-9
    torch.testing.assert_close(bias, y.mean(0))


# Layers


def test_a_network_that_lost_nothing_stays_as_it_is():
    whole, some = network(), images(30)
    small, removed, kept = without(whole)
    repairs = [
        least_squares.with_linear_refitted(small, whole, some, STRENGTH),
        least_squares.with_convolution_refitted(small, whole, kept, some),
        least_squares.with_means_absorbed(small, whole, removed, kept, some),
    ]
    for repaired in repairs:
        assert_same_logits(repaired, whole, images(20, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [20, 900], ids=["few images", "many images"])
@pytest.mark.parametrize("strength", [NOTHING, STRENGTH, 100.0])
def test_refitting_the_linear_layer_never_takes_the_fitted_logits_further_away(number, strength):
    whole, some = network((3, 2)), images(number)
    small, *_ = without(whole, [0], [1])  # 784 values are left
    repaired = least_squares.with_linear_refitted(small, whole, some, strength)
    assert error(repaired, whole, some) < error(small, whole, some)


def test_refitting_the_convolution_never_takes_the_fitted_sums_further_away():
    whole, some = network(), images(30)
    small, _, kept = without(whole, [1], [0, 2])
    repaired = least_squares.with_convolution_refitted(small, whole, kept, some)
    with torch.no_grad():
        target = whole.network[:3](some)[:, kept]
        before, after = (mse_loss(n.network[:3](some), target) for n in (small, repaired))
    assert after < before


def test_a_repair_changes_one_layer_of_a_copy():
    whole, some = network(), images(30)
    small, _, kept = without(whole, [1], [0])
    before = {name: value.clone() for name, value in small.state_dict().items()}
    for layer, repaired in (
        (5, least_squares.with_linear_refitted(small, whole, some, STRENGTH)),
        (2, least_squares.with_convolution_refitted(small, whole, kept, some)),
    ):
        changed = {k for k, v in repaired.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {f"network.{layer}.weight", f"network.{layer}.bias"}
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name])


def duplicated(layer, channels):
    """A network whose last filter of a convolution computes what its first one does."""
    whole = network(channels)
    with torch.no_grad():
        whole.network[layer].weight[0].abs_()  # alive
        whole.network[layer].weight[-1] = whole.network[layer].weight[0]
        whole.network[layer].bias[-1] = whole.network[layer].bias[0]
    return whole


def test_the_first_of_two_equal_filters_does_the_work_of_both():
    whole = duplicated(0, (3, 2))
    small, _, kept = without(whole, first=[2])
    repaired = least_squares.with_convolution_refitted(small, whole, kept, images(20))
    assert error(small, whole, images(20, 1)) > 1e-5
    assert_same_logits(repaired, whole, images(20, 1), rtol=0, atol=1e-4)

    whole = duplicated(2, (2, 2))
    small, *_ = without(whole, second=[1])
    repaired = least_squares.with_linear_refitted(small, whole, images(900), NOTHING)
    assert error(small, whole, images(20, 1)) > 1e-5
    assert_same_logits(repaired, whole, images(20, 1), rtol=0, atol=1e-4)


def test_a_map_that_never_changes_is_replaced_by_a_bias():
    whole = network()
    with torch.no_grad():
        whole.network[2].weight[1] = 0
        whole.network[2].bias[1] = 0.5
    small, removed, kept = without(whole, second=[1])
    repaired = least_squares.with_means_absorbed(small, whole, removed, kept, images(10))
    assert error(small, whole, images(20, 1)) > 1e-5
    assert_same_logits(repaired, whole, images(20, 1), rtol=0, atol=1e-5)


def test_a_dead_map_does_not_stop_the_repair():
    whole = network()
    with torch.no_grad():
        whole.network[0].weight[0] = 0
        whole.network[0].bias[0] = -1
    small, _, kept = without(whole, first=[1])
    repaired = least_squares.with_convolution_refitted(small, whole, kept, images(20))
    repaired = least_squares.with_linear_refitted(repaired, whole, images(20), STRENGTH)
    assert all(value.isfinite().all() for value in repaired.parameters())


# The long run


@pytest.fixture
def small_run(monkeypatch):
    monkeypatch.setattr(repair, "IMAGES", 40)
    monkeypatch.setattr(repair, "CONVOLUTION_IMAGES", 10)
    monkeypatch.setattr(repair, "OTHER_IMAGES", (20, 60))
    monkeypatch.setattr(repair, "BASELINE_EPOCHS", 1)
    monkeypatch.setattr(repair, "EPOCHS", {7: (1,), 16: (1, 2)})
    return dataset(64), dataset(20, 1), dataset(20, 2)


def test_every_row_of_a_seed_is_another_network(small_run, tmp_path):
    rows = pd.DataFrame(repair.compare(0, tmp_path, *small_run))
    assert not rows.duplicated([*repair.COLUMNS]).any()
    assert {*rows.columns} == {*repair.COLUMNS, "channels", "val_accuracy", "test_accuracy"}
    convolutional = rows[rows.method != "pixels"]
    for _, group in convolutional.groupby("removed"):
        assert group.channels.nunique() == 1, "the methods don't have the same widths"
    assert rows.val_accuracy.notna().all()


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_rows(
    small_run, monkeypatch, tmp_path
):
    whole = repair.compare(0, tmp_path / "whole", *small_run)

    def interrupted(*arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return fit(*arguments, **options)

    calls, fit = [], repair.fit
    monkeypatch.setattr(repair, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair.compare(0, tmp_path / "stopped", *small_run)
    monkeypatch.setattr(repair, "fit", fit)
    assert repair.compare(0, tmp_path / "stopped", *small_run) == whole


def test_each_difference_that_is_tested_is_one_of_networks_in_the_table():
    assert len({*repair.TESTED}) == len(repair.TESTED) == 11
    table = pd.read_csv(repair.TABLE, comment="#")
    rows = table[(table.removed == 16) & table.images.isin([0, repair.IMAGES])]
    rows = rows.set_index(["method", "repair", "epochs"])
    for one, other, which in repair.TESTED:
        for way in (one, other):
            assert rows.loc[way, which].notna().sum() == len(repair.SEEDS), way


def test_the_linear_map_of_pixels_is_the_ridge_to_the_logits_and_takes_images():
    whole, some = network(), images(50)
    linear = repair.of_pixels(whole, some)
    with torch.no_grad():
        weight, bias = least_squares.ridge(some.flatten(1), whole(some), repair.STRENGTH)
        torch.testing.assert_close(linear(some), some.flatten(1) @ weight.T + bias)


def test_what_chance_removes_does_not_depend_on_the_images_and_differs_from_taylors():
    whole = network((8, 16))
    one, two = (repair.choices(whole, dataset(64, seed), 0) for seed in (0, 1))
    for removed in repair.EPOCHS:
        assert sum(map(len, one[removed]["taylor"].values())) == removed
        shapes = {tuple(map(len, filters.values())) for filters in one[removed].values()}
        assert len(shapes) == 1
        for layer, filters in one[removed]["random"].items():
            shared = min(len(filters), len(two[removed]["random"][layer]))
            assert filters[:shared] == two[removed]["random"][layer][:shared]
    assert one[16]["random"] != one[16]["taylor"]


# What notebook 10 says


@pytest.fixture(scope="module")
def table():
    found = pd.read_csv(repair.TABLE, comment="#")
    return found[(found["repair"] != "both") | (found.images == repair.IMAGES)]


def by_seed(table, removed, method, repaired, epochs=0, column="test_accuracy"):
    rows = table[(table.removed == removed) & (table.method == method) & (table.epochs == epochs)]
    return 100 * rows[rows["repair"] == repaired].set_index("seed")[column].sort_index()


def interval(gaps):
    half = t.ppf(0.975, len(gaps) - 1) * gaps.std() / len(gaps) ** 0.5
    return gaps.mean() - half, gaps.mean() + half


LAST = max(repair.EPOCHS[16])


def test_the_repair_takes_most_of_taylors_lead_and_of_what_a_bad_draw_costs(table):
    leads = {
        start: by_seed(table, 16, "taylor", start) - by_seed(table, 16, "random", start)
        for start in ("none", "both")
    }
    assert interval(leads["none"] - leads["both"])[0] > 0
    assert leads["both"].mean() < leads["none"].mean() / 4
    assert leads["none"].max() > 20 and leads["both"].max() < 8, "what a bad draw costs"


def test_after_five_epochs_repaired_starts_end_lower_on_average_with_every_choice(table):
    for method in repair.METHODS:
        gaps = by_seed(table, 16, method, "both", LAST) - by_seed(table, 16, method, "none", LAST)
        assert gaps.mean() < 0, method


def test_weights_come_close_to_taylor_once_both_are_repaired(table):
    gaps = by_seed(table, 16, "taylor", "both") - by_seed(table, 16, "weight", "both")
    assert abs(gaps.mean()) < 1


def test_the_repair_alone_ends_half_a_point_behind_an_epoch(table):
    gaps = by_seed(table, 16, "taylor", "both") - by_seed(table, 16, "taylor", "none", 1)
    assert interval(gaps)[1] < 0 and -0.7 < gaps.mean() < -0.3, "half a point behind"


def test_the_repair_alone_is_within_a_point_of_an_epoch_and_five_go_further(table):
    for method in repair.METHODS:
        repaired = by_seed(table, 16, method, "both").mean()
        one, last = (by_seed(table, 16, method, "none", epochs).mean() for epochs in (1, LAST))
        assert abs(repaired - one) < 1, method
        assert last > max(repaired, one), method


def test_as_a_start_the_repair_gains_little_and_less_after_longer_training(table):
    gains = [
        (by_seed(table, 16, "taylor", "both", n) - by_seed(table, 16, "taylor", "none", n)).mean()
        for n in (1, LAST)
    ]
    assert gains[1] < gains[0] < 1


def test_absorbing_means_is_worse_than_nothing_where_much_is_removed(table):
    worse = 0
    for method in repair.METHODS:
        mean, nothing = (
            by_seed(table, 16, method, name, column="val_accuracy") for name in ("mean", "none")
        )
        assert mean.mean() < nothing.mean()
        worse += (mean < nothing).sum()
    assert worse == 25, "of 30 networks"


def test_a_linear_map_of_pixels_gets_most_of_the_way_and_untrained_filters_half_of_the_rest(table):
    right = {
        method: by_seed(table, 16, method, "linear", column="val_accuracy").mean()
        for method in ("pixels", "untrained", *repair.METHODS)
    }
    chosen = min(right["taylor"], right["weight"])
    assert chosen > max(right["pixels"], right["untrained"], right["random"])
    assert right["pixels"] > 0.9 * right["taylor"], "most of the way"
    rest = (right["untrained"] - right["pixels"]) / (right["taylor"] - right["pixels"])
    assert 0.4 < rest < 0.6, "about half"


def test_a_thousand_images_do_most_of_the_work():
    table = pd.read_csv(repair.TABLE, comment="#")
    rows = table[(table.removed == 16) & (table.method == "taylor") & (table.epochs == 0)]
    nothing = rows[rows["repair"] == "none"].val_accuracy.mean()
    by_images = rows[rows["repair"] == "both"].groupby("images").val_accuracy.mean() - nothing
    assert by_images[1_000] > 0.9 * by_images.max()
