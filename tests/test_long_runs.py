"""The programs that take hours, and the tables and pictures that they leave."""

import io

import pandas as pd
import pytest
import torch
from long_runs import (
    every_network,
    own_network,
    repair,
    residual,
    schedules,
    seeds,
    trained,
    updates,
    whole_tables,
)
from torch.utils.data import TensorDataset

from cnn_pruning import (
    CNN,
    TaylorPruner,
    evaluate,
    fashion_mnist,
    filter_scores,
    remove_filters,
    select_filters,
)
from cnn_pruning.measure import count_macs

PROGRAMS = pytest.mark.parametrize(
    "program",
    [seeds, schedules, updates, every_network, own_network, residual, repair],
    ids=lambda program: program.__name__.removeprefix("long_runs."),
)
TABLES = {
    seeds.TABLE: seeds,
    schedules.WAY: schedules,
    schedules.POINTS: schedules,
    updates.TABLE: updates,
    every_network.PAIRS: every_network,
    every_network.SIZES: every_network,
    every_network.CHOICES: every_network,
    every_network.FILTERS: every_network,
    own_network.TABLE: own_network,
    residual.TABLE: residual,
    repair.TABLE: repair,
}
NETWORKS = {program: program.TRAINED.name for program in (own_network, residual)}
EACH_TABLE = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.randint(10, (size,), generator=generator))


TRAIN, VAL = dataset(48), dataset(20, seed=1)


def network(channels=(3, 4)):
    torch.manual_seed(0)
    return CNN(channels)


def fast(program, monkeypatch, rows, fail_at=None, error=RuntimeError):
    """Let ``program`` make the rows of ``rows(seed)``, in no time; it stops at seed ``fail_at``."""

    def make(seed):
        if seed == fail_at:
            raise error
        return rows(seed)

    monkeypatch.setattr(program, "fashion_mnist", lambda: (TRAIN, VAL, VAL))
    if program in (seeds, repair):
        monkeypatch.setattr(program, "compare", lambda seed, *_: make(seed))
        return
    if program is updates:
        monkeypatch.setattr(updates, "on_the_way", lambda seed, splits: make(seed))
        return
    if program is every_network:
        monkeypatch.setattr(trained, "networks", lambda seeds: [network((1, 1)) for _ in seeds])
        names = tables_of(program)
        monkeypatch.setattr(
            program, "rows_of_seed", lambda seed, *_: {n: make(seed) for n in names}
        )
        return
    if program in NETWORKS:

        def made(seed, folder, *splits, core=False):
            rows, kept = make(seed), io.BytesIO()
            torch.save(torch.nn.Linear(seed, 1).state_dict(), kept)
            return rows, kept.getvalue()

        monkeypatch.setattr(program, "rows_of_seed", made)
        monkeypatch.setattr(
            program.shutil, "copyfile", lambda network, path: path.write_bytes(network)
        )
        return
    monkeypatch.setattr(schedules, "baseline", lambda *_, seed, **__: (seed, "run"))
    monkeypatch.setattr(
        schedules, "on_the_way", lambda model, train, val, seed: (rows(seed), {"taylor": []})
    )
    # The second table fails: the first must not be replaced alone.
    monkeypatch.setattr(schedules, "fine_tuned", lambda model, splits, seed, found: make(seed))


def tables_of(program):
    return [path.name for path, owner in TABLES.items() if owner is program]


def files_of(program):
    """What a whole run leaves: its tables and, if it stores one, the first seed's network."""
    return sorted([*tables_of(program), *(NETWORKS[k] for k in NETWORKS if k is program)])


def row(seed):
    return [{"seed": seed, "method": "some", "accuracy": 0.5}]


# Tables


@EACH_TABLE
def test_a_committed_table_is_that_of_the_documented_run_with_the_constants_of_its_program(path):
    program = TABLES[path]
    settings = whole_tables.read_settings(path)
    assert settings == program.settings(program.SEEDS)
    assert settings["seeds"] == list(program.SEEDS)
    table = pd.read_csv(path, comment="#")
    counts = table.groupby("seed").size()
    assert list(counts.index) == list(program.SEEDS)
    assert counts.nunique() == 1
    assert not [name for name in table if name.startswith("Unnamed")]


@PROGRAMS
def test_without_arguments_it_is_the_documented_run(program, capsys):
    assert whole_tables.arguments("", program.SEEDS, []) == (
        list(program.SEEDS),
        whole_tables.FOLDER,
    )
    words = [str(seed) for seed in reversed(program.SEEDS)]
    assert whole_tables.arguments("", program.SEEDS, words)[0] == list(program.SEEDS)
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    name = program.__name__.replace(".", "/")
    assert f"uv run python notebooks/{name}.py" in capsys.readouterr()[0]


@PROGRAMS
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["one"], "a seed is an integer of 0 or more, not 'one'"),
        (["-1"], "-1"),
        (["1.5"], "a seed is an integer of 0 or more, not '1.5'"),
        (["1", "1", "--out", "elsewhere"], "name each seed once, not 1 1"),
        (["7"], "name another folder with --out"),
        (["7", "--out", str(whole_tables.FOLDER)], "name another folder with --out"),
        (["--out", __file__], "can't be a folder"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence_before_anything_is_read(
    program, given, sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "fashion_mnist", lambda: pytest.fail("it has begun"))
    before = {path: path.read_bytes() for path in TABLES}
    with pytest.raises(SystemExit) as end:
        program.main(given)
    assert end.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert sentence in last
    assert {path: path.read_bytes() for path in TABLES} == before
    assert list(tmp_path.iterdir()) == []


@PROGRAMS
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_stops_midway_leaves_the_old_tables(program, error, monkeypatch, tmp_path):
    for name in tables_of(program):
        (tmp_path / name).write_bytes(b"the old table\n")
    fast(program, monkeypatch, row, fail_at=1, error=error)
    with pytest.raises(error):
        program.main(["0", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tables_of(program))
    for name in tables_of(program):
        assert (tmp_path / name).read_bytes() == b"the old table\n"


@PROGRAMS
@pytest.mark.parametrize(
    "rows",
    [
        lambda seed: [],
        lambda seed: row(seed)[seed:],  # the second seed has none
        lambda seed: row(seed) * (1 + seed),  # the first one has fewer
    ],
    ids=["empty", "a seed missing", "rows missing"],
)
def test_a_table_that_is_not_whole_replaces_nothing(program, rows, monkeypatch, tmp_path):
    for name in tables_of(program):
        (tmp_path / name).write_bytes(b"the old table\n")
    fast(program, monkeypatch, rows)
    with pytest.raises(ValueError, match="isn't whole"):
        program.main(["0", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tables_of(program))
    for name in tables_of(program):
        assert (tmp_path / name).read_bytes() == b"the old table\n"


@PROGRAMS
def test_a_disk_that_is_full_leaves_the_old_tables(program, monkeypatch, tmp_path):
    for name in tables_of(program):
        (tmp_path / name).write_bytes(b"the old table\n")
    fast(program, monkeypatch, row)

    def half(self, file, **_):
        file.write("seed,accu")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="No space"):
        program.main(["0", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tables_of(program))
    for name in tables_of(program):
        assert (tmp_path / name).read_bytes() == b"the old table\n"


@PROGRAMS
def test_a_whole_run_writes_its_tables_with_its_settings(program, monkeypatch, tmp_path):
    folder = tmp_path / "new" / "folder"
    fast(program, monkeypatch, row)
    before = {path: path.read_bytes() for path in TABLES}
    program.main(["8", "7", "--out", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == files_of(program)
    for path in folder.glob("*.csv"):
        assert whole_tables.read_settings(path) == program.settings([7, 8])
        expected = pd.DataFrame(row(7) + row(8))
        pd.testing.assert_frame_equal(pd.read_csv(path, comment="#"), expected)
    for path in folder.glob("*.pt"):
        stored = torch.load(path, weights_only=True)
        assert stored["weight"].shape == (1, 7), "not the network of the first seed"
    assert {path: path.read_bytes() for path in TABLES} == before


@PROGRAMS
def test_the_documented_run_replaces_the_tables_beside_the_program(program, monkeypatch, tmp_path):
    monkeypatch.setattr(whole_tables, "FOLDER", tmp_path)
    fast(program, monkeypatch, row)
    program.main([])
    assert sorted(path.name for path in tmp_path.iterdir()) == files_of(program)
    for path in tmp_path.glob("*.csv"):
        assert whole_tables.read_settings(path) == program.settings(program.SEEDS)


# Schedules


def removed(steps):
    """The one filter of each step, with its layer."""
    found = [[(layer, k) for layer, ks in s.removed.items() for k in ks] for s in steps]
    return [filter for (filter,) in found]


def test_random_like_taylor_takes_other_filters_of_the_same_layers():
    model = network((6, 8))
    like = list(schedules.schedule(model, TRAIN, VAL, "taylor", 1, seed=0))
    control = list(schedules.schedule(model, TRAIN, VAL, schedules.SAME_LAYERS, 1, 0, like))
    assert [layer for layer, _ in removed(control)] == [layer for layer, _ in removed(like)]
    assert removed(control) != removed(like)
    assert control[-1].model.channels == (1, 1)


@pytest.fixture(scope="module", params=[0, 1])
def by_taylor(request):
    """A number of updates before each removal, and the steps of that schedule by Taylor."""
    steps = schedules.schedule(network(), TRAIN, VAL, "taylor", request.param, seed=0)
    return request.param, list(steps)


@pytest.mark.parametrize("method", [*schedules.CRITERIA, schedules.SAME_LAYERS])
def test_every_schedule_goes_down_to_one_filter_a_layer_and_is_the_same_again(method, by_taylor):
    updates, like = by_taylor
    first, again = (
        removed(schedules.schedule(network(), TRAIN, VAL, method, updates, 0, like))
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == len(first) == 5


@pytest.mark.parametrize("method", ["random", schedules.SAME_LAYERS])
def test_what_chance_removes_does_not_depend_on_the_images(method):
    model, other = network((6, 8)), dataset(48, seed=2)
    like = list(schedules.schedule(model, TRAIN, VAL, "taylor", 1, seed=0))
    one, two = (
        removed(schedules.schedule(model, images, VAL, method, 1, 0, like))
        for images in (TRAIN, other)
    )
    assert one == two
    assert one != removed(schedules.schedule(model, TRAIN, VAL, method, 1, 1, like))


def test_the_first_removal_of_the_oracle_is_that_of_the_smallest_change_without_normalization():
    model = network((6, 8))  # all 48 images are the random part: fewer than eight mini-batches
    (first, *_) = removed(schedules.schedule(model, TRAIN, VAL, "oracle", 0, seed=0))
    scores = filter_scores(model, TRAIN, "oracle_abs")
    lowest = min((value, layer, k) for layer in scores for k, value in enumerate(scores[layer]))
    assert first == lowest[1:]


# Networks


def test_the_stored_networks_are_ten_different_trained_ones():
    *_, test = fashion_mnist()
    networks, some = trained.networks(), TensorDataset(*test[:2000])
    losses, accuracies = zip(*(evaluate(model, some) for model in networks), strict=True)
    assert len({*losses}) == len(trained.SEEDS) == 10
    assert min(accuracies) > 0.88
    assert not any(model.training for model in networks)
    assert trained.TRAINED.stat().st_size < 3_000_000


def test_training_them_again_stores_what_is_read_and_nothing_beside_it(monkeypatch, tmp_path):
    def baseline(*splits, channels, seed, **training):
        torch.manual_seed(seed)
        return CNN(channels), "run"

    monkeypatch.setattr(trained, "fashion_mnist", lambda: (TRAIN, VAL, VAL))
    monkeypatch.setattr(trained, "baseline", baseline)
    before = trained.TRAINED.read_bytes()
    trained.main(["4", "7", "--out", str(tmp_path)])
    path = tmp_path / trained.TRAINED.name
    assert [*tmp_path.iterdir()] == [path]
    for seed, again in zip((7, 4), trained.networks((7, 4), path), strict=True):
        known = baseline(channels=trained.CHANNELS, seed=seed)[0].state_dict()
        for name, value in again.state_dict().items():
            torch.testing.assert_close(value, known[name], rtol=1e-3, atol=1e-6)  # of 16 bits
    with pytest.raises(ValueError, match=r"networks of the seeds \[4, 7\], none of 5"):
        trained.networks((4, 5), path)
    assert trained.TRAINED.read_bytes() == before


@pytest.mark.parametrize("program", [own_network, residual], ids=lambda program: program.TABLE.stem)
def test_a_stored_network_is_the_trained_one_of_the_first_seed(program):
    model = program.untrained(program.SEEDS[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(torch.load(program.TRAINED, weights_only=True))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert program.TRAINED.stat().st_size < 2_000_000


def test_the_two_sums_of_a_group_are_one_where_a_group_has_one_map():
    model = residual.untrained(0)
    after, before = residual.by_map(model, dataset(40))
    for name, maps in residual.MAPS.items():
        if len(maps) == 1:
            torch.testing.assert_close(after[name], before[name])
        else:
            assert (before[name] > after[name]).any()


def test_a_residual_network_gets_down_to_the_multiply_adds_with_as_few_removals_as_possible():
    data, model = dataset(8), residual.untrained(0)
    scores = {
        name: torch.arange(float(model.get_submodule(name).out_channels)) for name in residual.MAPS
    }
    macs = count_macs(model, residual.IMAGE_SHAPE) // 2
    pruner = TaylorPruner(model, normalize=False)
    pruner.score(data)
    pruner.scores = scores
    small = pruner.prune(macs=0.5)
    left = sum(small.get_submodule(name).out_channels for name in residual.MAPS)
    removed_one_less = select_filters(scores, sum(map(len, scores.values())) - left - 1)
    larger = remove_filters(model, removed_one_less, data)
    assert count_macs(small, residual.IMAGE_SHAPE) <= macs
    assert count_macs(larger, residual.IMAGE_SHAPE) > macs


def test_the_chain_has_its_core_table_where_a_seed_is_beyond_it(monkeypatch, tmp_path):
    def rows_of_seed(seed, folder, *splits, core):
        if not core:
            raise KeyboardInterrupt
        more = [{"seed": 0, "method": own_network.SAME_COMPUTE}] if seed == 0 else []
        return [{"seed": seed, "method": "baseline"}, *more], own_network.TRAINED

    monkeypatch.setattr(own_network, "fashion_mnist", lambda: (TRAIN, VAL, VAL))
    monkeypatch.setattr(own_network, "rows_of_seed", rows_of_seed)
    with pytest.raises(KeyboardInterrupt):
        own_network.main(["0", "1", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / own_network.TABLE.name, comment="#")
    assert [*table.seed] == [0, 1] and {*table.method} == {"baseline"}


def test_chance_in_the_same_layers_goes_through_taylors_widths(monkeypatch):
    fast = {"per_step": 60, "updates": 1, "batch_size": 24, "lr": 1e-3}
    monkeypatch.setattr(own_network, "SCHEDULE", fast)
    model = own_network.untrained(0)
    taylor = own_network.schedule(model, TRAIN, VAL, "taylor", 0, ())
    control = own_network.schedule(model, TRAIN, VAL, own_network.SAME_LAYERS, 0, taylor)
    for one, other in zip(taylor, control, strict=True):
        assert own_network.widths_of(one.model) == own_network.widths_of(other.model)
        assert one.removed != other.removed


def test_chance_in_the_residual_network_has_taylors_widths(monkeypatch):
    monkeypatch.setattr(residual, "SHARES", (0.5,))
    found = {method: small for method, _, small in residual.pruned(residual.untrained(0), TRAIN, 0)}
    assert {*residual.TESTED, "taylor", "random"} < {*found}

    def widths(method):
        return [found[method].get_submodule(name).out_channels for name in residual.MAPS]

    assert widths(residual.SAME_WIDTHS) == widths("taylor")
    one, other = (found[method].conv.weight for method in (residual.SAME_WIDTHS, "taylor"))
    assert not torch.equal(one, other)
