"""Does the choice of filters matter, and until when? For notebooks 5 and 7.

    uv run python notebooks/long_runs/lengths.py

takes some fourteen hours of one core. Each of ten baselines loses filters at once, down to three
shares of its multiply-adds: those with the lowest Taylor scores, those with the smallest weights,
or random ones, as many of each layer as Taylor takes. Each network is then fine-tuned for several
lengths, and each length is a schedule of its own, with a learning rate that falls linearly from
the same start. Beside them, networks of Taylor's widths start from scratch: with as many epochs as
baseline and fine-tuning have together (rounded up), and with as many multiply-adds. The baseline
trains on for as long.

It writes lengths.csv, one row a network: when what decides is there for all baselines (``CORE``),
and again when all is. Each row is kept in the folder lengths.part as it is done, so the program can
be stopped, and goes on where it was. Several processes can share a folder (``--out``) if each is
given seeds of its own; a last call without seeds writes the table.

Stated before the run: ``tested`` has the differences that are tested, on test accuracy, paired by
baseline, with Bonferroni's correction for all of them. The expectation was that Taylor's lead over
random filters shrinks as fine-tuning gets longer. All other differences only describe. Every
training has the learning rate of notebook 5's; none was tuned.
"""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnn_pruning import CNN, TaylorPruner, evaluate, fashion_mnist, fit, remove_filters
from cnn_pruning.measure import count_macs

import pandas as pd
import torch
from torch.utils.data import Dataset, TensorDataset

try:
    from long_runs import whole_tables
except ImportError:  # run as a program
    import whole_tables

SEEDS = tuple(range(10))  # of the documented run
CHANNELS = (8, 16)
BASELINE_EPOCHS = 5
TRAINING = {"batch_size": 128, "lr": 3e-3}  # of every training
SHARES = (0.75, 0.5, 0.25)  # of the baseline's MACs
LENGTHS = (0.5, 1, 2, 5, 10)  # epochs after the removal; half an epoch is one of half the images
TAYLOR, WEIGHT, RANDOM = "taylor", "weight", "random, same layers"
SAME_EPOCHS, SAME_COMPUTE = "scratch, same epochs", "scratch, same compute"
WHOLE = "baseline, more epochs"
METHODS = (TAYLOR, WEIGHT, RANDOM, SAME_EPOCHS, SAME_COMPUTE)
CORE = tuple(
    itertools.product([0.25], (TAYLOR, RANDOM, SAME_EPOCHS), (1, 5, 10))
)  # (share, method, length), for all seeds before anything else
TESTS = 10  # of ``tested``
TABLE = whole_tables.FOLDER / "lengths.csv"


def settings() -> dict:
    return {
        "channels": [*CHANNELS],
        "baseline_epochs": BASELINE_EPOCHS,
        "training": TRAINING,
        "shares": [*SHARES],
        "lengths": [*LENGTHS],
        "methods": [*METHODS],
    }


def jobs() -> list[tuple[float, str, float]]:
    """(share, method, length) of every network but the baseline, the smallest first."""
    shares = sorted(SHARES)
    every = [*itertools.product(shares, METHODS, LENGTHS), *((1.0, WHOLE, n) for n in LENGTHS)]
    return every


def tested(table: pd.DataFrame) -> Iterator[tuple[str, float, pd.Series]]:
    """Yield what is tested at 25% of the multiply-adds: (what, length, differences by seed).

    Taylor's lead in test accuracy (points) over random filters and over both networks from scratch,
    after 1, 5 and 10 epochs; and how much less the first is after 10 epochs than after 1. These are
    ``TESTS``; those whose networks aren't there yet are left out.
    """
    accuracy = 100 * table[table.share == 0.25].pivot(
        index="seed", columns=["method", "length"], values="test_accuracy"
    )
    for other, length in itertools.product((RANDOM, SAME_EPOCHS, SAME_COMPUTE), (1, 5, 10)):
        if (other, length) in accuracy:
            yield other, length, accuracy[TAYLOR, length] - accuracy[other, length]
    lead = accuracy[TAYLOR] - accuracy[RANDOM]
    yield "change of the lead over random", math.nan, lead[1] - lead[10]


def one_seed(seed: int, folder: Path, wanted: Sequence[tuple]) -> whole_tables.Rows:
    """Train what is missing of the ``wanted`` networks of one seed; return all its rows."""
    rows = whole_tables.Rows(folder / f"{seed}.jsonl", settings() | {"seed": seed})
    missing = [job for job in wanted if not rows.has(**labels(*job))]
    if not missing:
        return rows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val, test = (
        TensorDataset(*(values.to(device) for values in split.tensors)) for split in fashion_mnist()
    )
    model = trained_baseline(seed, folder, train, val).to(device)
    whole = count_macs(model)
    if not rows.has(method="baseline"):
        rows.add(row(seed, 1.0, "baseline", 0, model, BASELINE_EPOCHS, val, test, whole))
    pruners = {name: TaylorPruner(model, criterion=name) for name in (TAYLOR, WEIGHT)}
    for pruner in pruners.values():
        pruner.score(train)
    for share, method, length in missing:
        if method == WHOLE:
            network, epochs = copy.deepcopy(model), length
        elif method in pruners:
            network, epochs = pruners[method].prune(macs=share), length
        elif method == RANDOM:
            network, epochs = remove_filters(model, at_random(pruners[TAYLOR], share, seed)), length
        else:
            small = pruners[TAYLOR].prune(macs=share)
            torch.manual_seed(seed)
            network = CNN(small.channels).to(device)
            earlier = whole / count_macs(small) if method == SAME_COMPUTE else 1
            epochs = math.ceil(BASELINE_EPOCHS * earlier + length)
        before = evaluate(network, val)[1]
        data = train
        if epochs < 1:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            data = TensorDataset(*train[order[: int(epochs * len(train))]])
        fit(network, data, val, max(1, int(epochs)), seed=seed, **TRAINING)
        done = row(seed, share, method, length, network, epochs, val, test, whole)
        rows.add(done | {"val_before": None if method.startswith("scratch") else before})
    return rows


def labels(share: float, method: str, length: float) -> dict:
    return {"share": share, "method": method, "length": length}


def trained_baseline(seed: int, folder: Path, train: Dataset, val: Dataset) -> CNN:
    """The baseline of this seed, with 16 bits a weight, kept with its rows: another machine would
    train another.
    """
    kept = folder / f"{seed}.pt"
    torch.manual_seed(seed)
    model = CNN(CHANNELS)
    if not kept.exists():
        model.to(train.tensors[0].device)
        fit(model, train, val, BASELINE_EPOCHS, seed=seed, **TRAINING)
        state = {name: value.cpu().half() for name, value in model.state_dict().items()}
        torch.save(state, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model


def at_random(pruner: TaylorPruner, share: float, seed: int) -> dict[str, list[int]]:
    """Random filters, as many of each layer as ``pruner`` takes."""
    generator = torch.Generator().manual_seed(seed)
    order = {name: torch.rand(len(s), generator=generator) for name, s in pruner.scores.items()}
    taken = pruner.select(macs=share)
    return {name: order[name].argsort()[: len(taken[name])].tolist() for name in taken}


def row(
    seed: int,
    share: float,
    method: str,
    length: float,
    network: CNN,
    epochs: float,
    val: Dataset,
    test: Dataset,
    whole: int,
) -> dict:
    """What there is to say of a trained network; ``whole`` are the baseline's multiply-adds."""
    macs = count_macs(network)
    earlier = 0 if method in (SAME_EPOCHS, SAME_COMPUTE, "baseline") else BASELINE_EPOCHS
    return {
        "seed": seed,
        **labels(share, method, length),
        "channels": "-".join(map(str, network.channels)),
        "macs": macs,
        "epochs": epochs,
        # The multiply-adds of all its training, in epochs of the baseline.
        "compute": round(earlier + epochs * macs / whole, 2),
        "val_before": None,
        "val_accuracy": evaluate(network, val)[1],
        "test_accuracy": evaluate(network, test)[1],
    }


def main(given: Sequence[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    for wanted in (CORE, jobs()):
        found = [one_seed(seed, folder / "lengths.part", wanted) for seed in seeds]
        there = sorted((row for each in found for row in each.rows), key=in_order)
        counts = Counter(map(job_of, there))
        rows = [row for row in there if counts[job_of(row)] == len(seeds)]
        whole_tables.write({folder / TABLE.name: rows}, settings() | {"seeds": seeds})


def job_of(row: dict) -> tuple:
    return row["share"], row["method"], row["length"]


def in_order(row: dict) -> tuple:
    methods = ("baseline", *METHODS, WHOLE)
    return row["seed"], -row["share"], methods.index(row["method"]), row["length"]


if __name__ == "__main__":
    main()
