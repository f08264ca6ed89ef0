"""The long version of notebook 7.

    uv run python notebooks/long_runs/schedules.py

takes about two hours on two cores and writes two tables: schedules.csv, a row for each
network on the way (which filters went, what it costs, its validation accuracy before any final
fine-tuning), and operating_points.csv, networks fine-tuned at three sizes.
"""

from collections.abc import Callable, Iterator

from cnn_pruning import CNN, TaylorPruner, evaluate, fashion_mnist, filter_scores, fit, normalize
from cnn_pruning.baseline import baseline
from cnn_pruning.iterative import Step, prune_iteratively
from cnn_pruning.measure import count_macs

import torch
from torch import nn
from torch.utils.data import TensorDataset

try:
    from long_runs import whole_tables
except ImportError:  # run as a program
    import whole_tables

SEEDS = tuple(range(10))  # of the documented run
BASELINE = {"channels": (8, 16), "epochs": 3, "batch_size": 128, "lr": 3e-3}
UPDATES = 30
TRAINING = {"batch_size": 128, "lr": 1e-3}
FINE_TUNE = {"epochs": 1, "batch_size": 128, "lr": 1e-3}
SHARES = (0.75, 0.5, 0.25)  # of the baseline's MACs
ORACLE_BATCHES = 8  # of the batch size of TRAINING
CRITERIA = {
    "taylor": "taylor",
    "oracle": "oracle_abs",
    "weight": "weight",
    "activation_mean": "activation_mean",
    "apoz": "apoz",
    "random": "random",
}
SAME_LAYERS = "random, same layers"
WAY = whole_tables.FOLDER / "schedules.csv"
POINTS = whole_tables.FOLDER / "operating_points.csv"


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "baseline": BASELINE | {"channels": [*BASELINE["channels"]]},
        "updates": UPDATES,
        "training": TRAINING,
        "fine_tune": FINE_TUNE,
        "shares": [*SHARES],
        "oracle_batches": ORACLE_BATCHES,
        "criteria": CRITERIA,
    }


def schedule(
    model: CNN, train, val, method: str, updates: int, seed: int, like: list[Step] = ()
) -> Iterator[Step]:
    """The steps of ``method`` down to one filter a layer.

    ``"random, same layers"`` takes, at each step, a random filter of the layer that the same step
    of ``like`` took one from.
    """
    options = {"criterion": CRITERIA.get(method, "random")}
    if method == "oracle":
        options = on_some(train, "oracle_abs", ORACLE_BATCHES, seed, normalize)
    elif method == "taylor" and updates == 0:  # no pass in which the scores would come for free
        options = on_some(train, "taylor", UPDATES, seed, normalize)
    elif method == "random":
        options["rescore"] = lambda network, scores: scores
    elif method == SAME_LAYERS:
        layers = [layer for step in like for layer, filters in step.removed.items() if filters]
        options["rescore"] = only_of(iter(layers))
    torch.manual_seed(seed)  # for the random scores
    lowest = len(model.channels)
    return prune_iteratively(
        model, train, val, filters=lowest, updates=updates, seed=seed, **TRAINING, **options
    )


def only_of(layers: Iterator[str]) -> Callable:
    """Leave, at each step, the scores of one layer: no other layer can lose a filter then."""

    def rescore(network: nn.Module, scores: dict) -> dict:
        layer = next(layers)
        return {layer: scores[layer]}

    return rescore


def on_some(
    train, criterion: str, mini_batches: int, seed: int, then: Callable = lambda scores: scores
) -> dict:
    """Options with which each step scores on its own random part of the training images."""
    generator = torch.Generator().manual_seed(seed)
    size = mini_batches * TRAINING["batch_size"]

    def rescore(network: nn.Module, _) -> dict:
        some = torch.randperm(len(train), generator=generator)[:size]
        return then(filter_scores(network, TensorDataset(*train[some]), criterion))

    return {"criterion": "weight", "rescore": rescore}  # weights cost nothing, and aren't used


def row(step: Step, **labels) -> dict:
    removed = [f"{layer}:{k}" for layer, ks in step.removed.items() for k in ks]
    return labels | {
        "removed": " ".join(removed),
        "filters": step.filters,
        "parameters": step.parameters,
        "macs": step.macs,
        "val_accuracy": step.val_accuracy,
    }


def on_the_way(model: CNN, train, val, seed: int) -> tuple[list[dict], dict[str, list[Step]]]:
    rows, found = [], {}
    for method in (*CRITERIA, SAME_LAYERS):
        like = found.get("taylor", ())
        found[method] = list(schedule(model, train, val, method, UPDATES, seed, like))
        rows += [row(step, seed=seed, method=method, updates=UPDATES) for step in found[method]]
    return rows, found


def fine_tuned(model: CNN, splits: tuple, seed: int, found: dict[str, list[Step]]) -> list[dict]:
    """Networks at each share of the MACs: fine-tuned, pruned at once, and from scratch."""
    train, val, test = splits
    rows = []

    def add(
        method: str, share: float, network: CNN, epochs: int, earlier: float, before: float | None
    ) -> None:
        rows.append(
            {
                "seed": seed,
                "method": method,
                "share": share,
                "channels": "-".join(map(str, network.channels)),
                "epochs": epochs,
                # The multiply-adds of all its training, those of the baseline's included.
                "compute": round(earlier + epochs * count_macs(network) / whole, 2),
                "val_before": before,
                "val_accuracy": evaluate(network, val)[1],
                "test_accuracy": evaluate(network, test)[1],
            }
        )

    whole = count_macs(model)
    updates = UPDATES * TRAINING["batch_size"] / len(train)  # between two removals, in epochs
    for share in SHARES:
        for method, steps in found.items():
            # What the network costs while it is trained for the next removal.
            trained = [whole, *(step.macs for step in steps if step.macs > share * whole)]
            step = steps[len(trained) - 1]
            fit(step.model, train, val, seed=seed, **FINE_TUNE)
            earlier = BASELINE["epochs"] + updates * sum(trained) / whole
            add(method, share, step.model, FINE_TUNE["epochs"], earlier, step.val_accuracy)
            if method == "taylor":
                reached, compute, removals = step, earlier, len(trained)

        # One shot, with the multiply-adds of the schedule's updates added to the fine-tuning.
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(train), generator=generator)[: UPDATES * TRAINING["batch_size"]]
        pruner = TaylorPruner(model)
        pruner.score(TensorDataset(*train[some]))
        once = pruner.prune(sum(model.channels) - reached.filters)
        before = evaluate(once, val)[1]
        extra = (compute - BASELINE["epochs"]) * whole / count_macs(once)
        epochs = FINE_TUNE["epochs"] + round(extra)
        fit(once, train, val, seed=seed, **FINE_TUNE | {"epochs": epochs})
        add("one shot, same compute", share, once, epochs, BASELINE["epochs"], before)

        # The same architecture from scratch, with all the training that the pruned one has had.
        lengths = {
            "scratch, same epochs": BASELINE["epochs"] + updates * removals,
            "scratch, same compute": compute * whole / reached.macs,
        }
        for method, length in lengths.items():
            torch.manual_seed(seed)
            scratch = CNN(reached.model.channels)
            epochs = FINE_TUNE["epochs"] + round(length)
            fit(scratch, train, val, epochs, BASELINE["batch_size"], BASELINE["lr"], seed)
            add(method, share, scratch, epochs, 0, None)
    fit(model, train, val, seed=seed, **FINE_TUNE)
    add("baseline, more epochs", 1.0, model, FINE_TUNE["epochs"], BASELINE["epochs"], None)
    return rows


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    steps, points = [], []
    for seed in seeds:
        model, _ = baseline(*splits, seed=seed, **BASELINE)
        rows, found = on_the_way(model, *splits[:2], seed)
        steps += rows
        points += fine_tuned(model, splits, seed, found)
    tables = {folder / WAY.name: steps, folder / POINTS.name: points}
    whole_tables.write(tables, settings(seeds))


if __name__ == "__main__":
    main()
