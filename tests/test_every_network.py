"""Every pruned version of a network: the evaluation, what is kept of it, and the game."""

import itertools
import math

import pandas as pd
import pytest
import torch
from long_runs import every_network as every
from long_runs import levels, trained, whole_tables
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cnn_pruning import CNN, evaluate, fashion_mnist, filter_scores, mask_filters
from cnn_pruning.measure import count_macs, count_parameters

TABLES = (every.PAIRS, every.SIZES, every.CHOICES, every.FILTERS)
WHOLE = 2**every.K - 1


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (size,), generator=generator))


@pytest.fixture(scope="module")
def network():
    """As initialized, but with larger weights, so that its filters matter."""
    torch.manual_seed(0)
    model = CNN(every.CHANNELS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


DATA = dataset(5)


@pytest.fixture(scope="module")
def losses(network):
    return every.all_losses(network, *DATA.tensors).flatten()


@pytest.fixture(scope="module")
def sizes():
    return every.sizes()


def some_subsets(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WHOLE + 1, (count,), generator=generator).tolist()


# Evaluation


def test_the_fast_losses_are_those_of_the_masked_network(network, losses):
    images, labels = DATA.tensors
    for subset in [0, WHOLE, 1, 1 << every.K - 1, *some_subsets(12)]:
        with torch.no_grad(), mask_filters(network, every.removed_of(subset)):
            plain = cross_entropy(network(images), labels)
        torch.testing.assert_close(losses[subset], plain, rtol=1e-5, atol=1e-5)


def test_losses_do_not_depend_on_the_size_of_the_pieces(network, losses):
    again = sum(
        every.all_losses(network, *(part[i : i + 1] for part in DATA.tensors)) for i in range(2)
    )
    two = every.all_losses(network, *(part[:2] for part in DATA.tensors))
    torch.testing.assert_close(again / 2, two, rtol=1e-5, atol=1e-5)


def test_logits_that_are_too_large_are_refused(network):
    large = CNN(every.CHANNELS)
    large.load_state_dict({k: 30 * v for k, v in network.state_dict().items()})
    with pytest.raises(ValueError, match="overflow"):
        every.all_losses(large, *DATA.tensors)


def test_accuracies_are_those_of_the_masked_network(network):
    subsets = [WHOLE, *some_subsets(6, seed=1)]
    data = dataset(23, seed=2)
    for subset, accuracy in zip(
        subsets, every.accuracies(network, *data.tensors, subsets).tolist(), strict=True
    ):
        with mask_filters(network, every.removed_of(subset)):
            assert accuracy == pytest.approx(evaluate(network, data)[1])


# Subsets


@pytest.mark.parametrize("subset", [0, WHOLE, *some_subsets(4)])
def test_a_subset_its_filters_and_its_text_say_the_same(subset):
    kept, removed = every.kept_of(subset), every.removed_of(subset)
    for layer, width in zip(every.LAYERS, every.CHANNELS, strict=True):
        assert sorted(kept[layer] + removed[layer]) == list(range(width))
    assert every.subset_of(kept) == subset
    assert every.number(every.text_of(subset)) == subset
    assert every.shape_of(every.text_of(subset)) == tuple(len(k) for k in kept.values())


def test_sizes_count_the_networks_that_could_be_built(sizes):
    for size in range(2, every.K + 1):
        assert (sizes == size).sum() == every.number_of(size)
    for subset in (0, 0xFF, 0xFFFF, 0xFF0000):  # a layer keeps none
        assert sizes[subset] == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 16)])
def test_costs_are_those_of_the_package(shape):
    assert every.macs_of(*shape) == count_macs(CNN(shape))
    assert every.parameters_of(*shape) == count_parameters(CNN(shape))


def test_the_mean_cost_of_a_size_is_that_of_its_networks(sizes):
    first, second = every.widths()
    size = 20
    costs = every.macs_of(first.double(), second.double()).expand(256, -1).flatten()
    assert every.mean_macs(size) == pytest.approx(costs[sizes == size].mean().item())


@pytest.mark.parametrize("number", [1, 20, 33, 2_704_000])
def test_stored_ranks_rise_from_the_best_to_the_worst(number):
    ranks = every.stored_ranks(number)
    assert ranks[0] == 1 and ranks[-1] == number
    assert all(a < b <= 1.05**4 * a + 5 for a, b in itertools.pairwise(ranks))


# What the methods choose


def test_shapley_values_share_out_what_the_network_is_worth(losses):
    worth = every.shapley(losses)
    assert worth.sum().item() == pytest.approx((losses[0] - losses[WHOLE]).item(), abs=1e-4)


def test_where_filters_add_up_each_shapley_value_is_what_the_filter_adds():
    adds = torch.randn(every.K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adds[5] = 0  # a dead filter
    half = every.gates(every.K // 2).double()
    value = (half @ adds[:12])[:, None] + half @ adds[12:]
    torch.testing.assert_close(every.shapley(-value.flatten()), adds)


def test_no_method_is_better_than_the_best_and_all_keep_a_filter_a_layer(network, losses, sizes):
    best = every.lowest(losses, sizes)
    scores = filter_scores(network, DATA)
    for found in (
        every.greedy(losses, sizes),
        every.in_order(scores),
        every.scored_anew(network, DATA, normalized=True),
    ):
        assert sorted(found) == list(range(2, every.K + 1))
        for size, subset in found.items():
            assert sizes[subset] == size
            assert losses[best[size]] <= losses[subset]
    for size in range(2, every.K + 1):
        assert every.rank_of(losses[best[size]], losses[sizes == size]) == 1


def test_a_step_of_re_scoring_never_takes_a_filter_back(network):
    found = every.scored_anew(network, DATA, normalized=False)
    for size in range(2, every.K):
        assert found[size] & found[size + 1] == found[size]
    lowest = min(
        (v, layer, k)
        for layer, s in filter_scores(network, DATA).items()
        for k, v in enumerate(s.tolist())
    )
    assert every.kept_of(~found[every.K - 1])[lowest[1]] == [lowest[2]]


def test_the_curvature_of_the_last_layer_is_that_of_the_softmax(network):
    value, slope, curvature = every.quadratic(network, DATA)
    images, labels = DATA.tensors
    with torch.no_grad():
        z = network.network[:4](images).flatten(2)
        blocks = network.network[-1].weight.unflatten(1, (every.SECOND, -1))
        c = torch.einsum("nkm,ckm->nkc", z, blocks)
        p = network(images).softmax(1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = (c @ spread @ c.mT).mean(0)
    torch.testing.assert_close(curvature[every.FIRST :, every.FIRST :].float(), exact)
    wrong = p - torch.eye(10)[labels]
    torch.testing.assert_close(slope[every.FIRST :].float(), (c * wrong[:, None]).sum(2).mean(0))
    assert value == pytest.approx(cross_entropy(network(images), labels).item())
    torch.testing.assert_close(curvature, curvature.T)


def test_the_approximation_is_the_taylor_expansion_at_every_subset(network):
    value, slope, curvature = every.quadratic(network, DATA)
    found = every.approximated(value, slope, curvature)
    for subset in [WHOLE, 0, *some_subsets(5)]:
        step = torch.tensor([float(b) - 1 for b in f"{subset:024b}"], dtype=torch.float64)
        expected = value + slope @ step + step @ curvature @ step / 2
        assert found[subset].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_mean_by_chance_weighs_every_network_alike():
    shapes = torch.tensor([every.kept_of(s)["network.0"].__len__() for s in every.drawn()])
    found = every.mean_by_chance(shapes.double(), 20)  # the mean width of the first layer
    counts = {i: math.comb(8, i) * math.comb(16, 20 - i) for i in range(4, 9)}
    assert found == pytest.approx(sum(i * n for i, n in counts.items()) / sum(counts.values()))


# Tables


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_committed_table_is_that_of_the_documented_run(path):
    assert whole_tables.read_settings(path) == every.settings(every.SEEDS)
    rows = pd.read_csv(path, comment="#").groupby("seed").size()
    assert list(rows.index) == list(every.SEEDS)
    assert rows.nunique() == 1


def test_the_tables_are_small():
    assert sum(path.stat().st_size for path in TABLES) < 1_000_000


def test_the_pairs_hold_every_network_once_and_no_method_beats_their_best():
    pairs = pd.read_csv(every.PAIRS, comment="#").set_index(["seed", "first", "second"])
    quantiles = pairs.loc[:, "0%":"100%"]
    assert (quantiles.copy().diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    choices = pd.read_csv(every.CHOICES, comment="#")
    assert (choices.excess >= 0).all()
    for row in choices.dropna().itertuples():
        shape = every.shape_of(row.subset)
        assert sum(shape) == row.size
        assert quantiles.loc[(row.seed, *shape), "0%"] <= row.loss + 1e-5
    for _, rows in pairs.groupby("seed"):
        assert rows.networks.sum() == 2**every.K
        for (_, *shape), row in rows.iterrows():
            assert every.shape_of(row.best) == tuple(shape)


def test_choices_and_sizes_tell_the_same_ranks():
    sizes = pd.read_csv(every.SIZES, comment="#")
    choices = pd.read_csv(every.CHOICES, comment="#").groupby(["seed", "size"])
    for (seed, size), known in sizes.groupby(["seed", "size"]):
        assert [*known["of"].unique()] == [every.number_of(size)]
        ranks = levels.Ranks(every.number_of(size), known["rank"].tolist(), known.loss.tolist())
        for row in choices.get_group((seed, size)).itertuples():
            # The table has some ranks only, and equal losses share theirs
            better = known["rank"][known.loss < row.loss - 2e-6].max()
            worse = known["rank"][known.loss > row.loss + 2e-6].min()
            for rank in (row.rank, ranks.rank(row.loss)[0]):
                assert not (rank < better or rank > worse)  # NaN where there is none
            if worse - better <= 2:
                assert ranks.rank(row.loss) == (row.rank, True)


def test_a_sample_of_the_committed_losses_is_computed_again():
    train = fashion_mnist()[0]
    images, labels = train[: every.IMAGES]
    choices = pd.read_csv(every.CHOICES, comment="#").dropna()
    for seed, network in zip(every.SEEDS, trained.networks(every.SEEDS), strict=True):
        row = choices[choices.seed == seed].sample(1, random_state=seed).iloc[0]
        removed = every.removed_of(every.number(row.subset))
        with torch.no_grad(), mask_filters(network, removed):
            loss = cross_entropy(network(images), labels).item()
        assert loss == pytest.approx(row.loss, abs=1e-5)


@pytest.fixture(scope="module")
def excess():
    """Nats above the best, by seed and a third of the sizes; a column a method."""
    choices = pd.read_csv(every.CHOICES, comment="#")
    kept = pd.cut(choices["size"], (1, 7, 15, 23), labels=("few", "half", "most"))
    return choices.pivot_table(
        index=[kept, "seed"], columns="method", values="excess", observed=True
    ).drop(columns="optimum")


def test_what_notebook_8_says_about_importance_holds_for_the_table(excess):
    means = excess.groupby(level=0).mean()
    others = means.drop(columns="greedy oracle")
    assert (means["greedy oracle"] <= others.min(axis=1)).all(), "on average, greedy is closest"
    most, few, half = excess.loc["most"], excess.loc["few"], excess.loc["half"]
    taylor = most[["taylor, raw", "taylor, normalized"]].max(axis=1)
    assert (taylor < 0.01).all() and (most["quadratic"] < 0.01).all(), "a hundredth of a nat"
    assert (most["random, mean"] > 20 * taylor).all(), "more than twenty times"
    assert (most["shapley"] > most["taylor, raw"]).all(), "worse on all ten"
    rankings = few.drop(columns=["greedy oracle", "random, mean"]).mean()
    assert (rankings > 3 * few["greedy oracle"].mean()).all(), "none stays near the best"
    ahead = half.lt(half["taylor, raw"], axis=0)
    assert ahead["taylor, raw, re-scored"].all() and not ahead["weights, raw"].any()
    assert (
        0.4 < means.loc["half", "taylor, raw, re-scored"] / means.loc["half", "taylor, raw"] < 0.6
    )
    assert ahead["taylor, normalized, re-scored"].sum() == 9
    assert [*ahead.index[ahead["shapley"]]] == [0, 1, 2, 3]


def test_the_second_order_misses_a_sixth_in_the_last_layer_and_two_thirds_in_the_first():
    filters = pd.read_csv(every.FILTERS, comment="#")
    filters["second"] = (filters.curvature / 2 - filters.slope - filters.oracle_abs).abs()
    filters["eq. 8"] = (784 * filters.taylor - filters.oracle_abs).abs()
    sums = filters.groupby(["layer", "seed"])[["second", "eq. 8", "oracle_abs"]].sum()
    errors = sums.div(sums.oracle_abs, axis=0).groupby("layer").mean()
    assert errors.loc["network.2", "second"] == pytest.approx(1 / 6, abs=0.02)
    assert errors.loc["network.0", ["second", "eq. 8"]].tolist() == pytest.approx(
        [2 / 3] * 2, abs=0.03
    )


def test_a_run_that_was_stopped_goes_on_with_the_network_it_was_at(monkeypatch, tmp_path):
    begun = []

    def rows_of_table(seed, *_):
        begun.append(seed)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return {path.name: [{"seed": seed, "loss": seed / 7}] for path in TABLES}

    monkeypatch.setattr(every, "all_losses", lambda *_: None)
    monkeypatch.setattr(every, "rows_of_table", rows_of_table)
    given = ["0", "1", "2", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        every.main(given)
    assert not list(tmp_path.glob("*.csv"))
    every.main(given)
    assert begun == [0, 1, 1, 2], "what is done isn't computed again"
    for path in TABLES:
        table = pd.read_csv(tmp_path / path.name, comment="#")
        assert table.loss.tolist() == [0, 1 / 7, 2 / 7]


def test_a_network_that_is_not_stored_is_not_replaced_by_another(tmp_path):
    with pytest.raises(ValueError, match="none of 17"):
        every.main(["17", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
