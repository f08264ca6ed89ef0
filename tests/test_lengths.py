"""The long run that crosses how filters are chosen with how long one fine-tunes."""

import io
import json

import numpy
import pandas as pd
import pytest
import torch
from figures.lengths import accuracy_by_length
from long_runs import lengths, whole_tables
from torch.utils.data import TensorDataset

from cnn_pruning import CNN, TaylorPruner, fit

SETTINGS = {"lr": 0.003}


def splits():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(80, 1, 28, 28, generator=generator)
    data = images, torch.randint(10, (80,), generator=generator)
    parts = slice(0, 48), slice(48, 64), slice(64, 80)
    return [TensorDataset(*(values[part] for values in data)) for part in parts]


SMALL = {
    "fashion_mnist": splits,
    "CHANNELS": (3, 4),
    "BASELINE_EPOCHS": 1,
    "SHARES": (0.25,),
    "LENGTHS": (0.5, 2),
    "CORE": ((0.25, lengths.TAYLOR, 2),),
    "TRAINING": {"batch_size": 16, "lr": 1e-3},
}


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(lengths, name, value)


def run(folder):
    lengths.main(["0", "1", "--out", str(folder)])
    return (folder / lengths.TABLE.name).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The table of a small run, as text, and its rows in the order in which they were made."""
    made, add = [], whole_tables.Rows.add
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(lengths, name, value)
        patch.setattr(
            whole_tables.Rows, "add", lambda rows, row: (made.append(row), add(rows, row))
        )
        return run(tmp_path_factory.mktemp("whole")), made


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_table(
    small, whole, tmp_path, monkeypatch
):
    for stop in (1, 9):
        left = iter(range(stop))

        def stopped(*arguments, left=left, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return fit(*arguments, **options)

        monkeypatch.setattr(lengths, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"stopped{stop}")
        monkeypatch.setattr(lengths, "fit", fit)
        assert run(tmp_path / f"stopped{stop}") == whole[0]


def test_what_decides_comes_first_for_all_baselines(whole):
    made = [(row["seed"], row["method"]) for row in whole[1]]
    first = [(seed, method) for seed in (0, 1) for method in ("baseline", lengths.TAYLOR)]
    assert made[:4] == first
    assert len({*made}) == 2 * len(("baseline", *lengths.METHODS, lengths.WHOLE))


def test_the_rows_say_what_was_trained(small, whole):
    table = pd.read_csv(io.StringIO(whole[0]), comment="#")
    jobs = table.groupby(["share", "method", "length"]).size()
    assert (jobs == 2).all()
    assert len(jobs) == 1 + len(lengths.jobs())
    whole = table.macs.max()
    pruned = table[table.share < 1]
    assert (pruned.macs <= pruned.share * whole).all()
    for _, same in table[table.method != lengths.WEIGHT].groupby(["seed", "share"]):
        assert same.channels.nunique() == 1  # Taylor's widths
    epochs = table.set_index("method").epochs
    assert set(epochs[lengths.SAME_EPOCHS]) == {2, 3}  # 1 + 0.5, rounded up, and 1 + 2
    compute = pruned.pivot_table(
        index=["seed", "share", "length"], columns="method", values="compute"
    )
    over = compute[lengths.SAME_COMPUTE] - compute[lengths.TAYLOR]
    assert (over >= -0.01).all() and (over <= 0.5).all()  # at most one epoch of half a network
    assert table.val_before.isna().equals(
        table.method.str.startswith("scratch") | (table.method == "baseline")
    )


def test_random_filters_are_as_many_of_each_layer_as_taylors():
    torch.manual_seed(0)
    pruner = TaylorPruner(CNN((6, 8)))
    pruner.score(splits()[0])
    taken, drawn = pruner.select(macs=0.3), lengths.at_random(pruner, 0.3, seed=1)
    assert {n: len(k) for n, k in taken.items()} == {n: len({*k}) for n, k in drawn.items()}
    others = [lengths.at_random(pruner, 0.3, seed) for seed in range(2, 6)]
    assert any(other != drawn for other in others)
    assert lengths.at_random(pruner, 0.3, seed=1) == drawn


def test_the_differences_are_paired_by_baseline_and_those_stated_beforehand():
    rng = numpy.random.default_rng(0)
    rows = [
        {"seed": s, "share": share, "method": m, "length": n, "test_accuracy": rng.random()}
        for s in range(3)
        for share in lengths.SHARES
        for m in lengths.METHODS
        for n in lengths.LENGTHS
    ]
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    found = list(lengths.tested(table))
    assert len(found) == lengths.TESTS
    assert len([*lengths.tested(table[table.method != lengths.SAME_COMPUTE])]) == lengths.TESTS - 3

    def accuracy(seed, method, length):
        (row,) = [
            r
            for r in rows
            if (r["seed"], r["share"], r["method"], r["length"]) == (seed, 0.25, method, length)
        ]
        return 100 * row["test_accuracy"]

    for other, length, gaps in found[:9]:
        for seed, gap in gaps.items():
            expected = accuracy(seed, lengths.TAYLOR, length) - accuracy(seed, other, length)
            assert gap == pytest.approx(expected)
    for seed, change in found[9][2].items():
        leads = [accuracy(seed, "taylor", n) - accuracy(seed, lengths.RANDOM, n) for n in (1, 10)]
        assert change == pytest.approx(leads[0] - leads[1])


def test_the_committed_table_has_what_decides_for_all_baselines():
    settings = whole_tables.read_settings(lengths.TABLE)
    expected = lengths.settings() | {"seeds": lengths.SEEDS}
    assert settings == json.loads(json.dumps(expected))
    table = pd.read_csv(lengths.TABLE, comment="#")
    jobs = table.groupby(["share", "method", "length"]).seed.apply(sorted)
    assert all(seeds == [*lengths.SEEDS] for seeds in jobs)
    assert {*lengths.CORE} <= {*jobs.index}


def test_the_small_numbers_are_on_how_many_baselines_the_first_is_ahead_of_the_second():
    found = {"first": (0.5, 0.6, 0.7), "second": (0.4, 0.7, 0.6), "baseline": (0.8, 0.8, 0.8)}
    rows = [
        {"seed": s, "share": 0.5, "method": m, "length": 1, "test_accuracy": value}
        for m, values in found.items()
        for s, value in enumerate(values)
    ]
    figure = accuracy_by_length(pd.DataFrame(rows), ["first", "second"], "title")
    assert "2 of 3" in [text.get_text() for text in figure.axes[0].texts]


# Rows that are kept as they are done


def test_rows_are_there_again_and_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "new" / "0.jsonl"
    rows = whole_tables.Rows(path, SETTINGS)
    rows.add({"seed": 0, "method": "a", "accuracy": 0.5})
    rows.add({"seed": 0, "method": "b", "accuracy": 0.25})
    path.write_text(path.read_text()[:-3])
    again = whole_tables.Rows(path, SETTINGS)
    assert again.rows == rows.rows[:1]
    assert again.has(method="a") and not again.has(method="b")
    again.add(rows.rows[1])
    assert whole_tables.Rows(path, SETTINGS).rows == rows.rows
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == rows.rows


def test_rows_of_other_settings_are_refused_and_kept(tmp_path):
    path = tmp_path / "0.jsonl"
    whole_tables.Rows(path, SETTINGS).add({"seed": 0})
    before = path.read_text()
    with pytest.raises(ValueError, match="rows of other settings: remove it"):
        whole_tables.Rows(path, {"lr": 0.001})
    assert path.read_text() == before
