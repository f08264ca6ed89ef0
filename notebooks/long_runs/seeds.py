"""The comparison of notebook 5 over several seeds.

    uv run python notebooks/long_runs/seeds.py

takes about an hour on two cores and writes seeds.csv: one row a network, with its
validation and test accuracy.
"""

from cnn_pruning import (
    CNN,
    TaylorPruner,
    evaluate,
    fashion_mnist,
    fit,
    remove_filters,
    select_filters,
)
from cnn_pruning.baseline import baseline
from cnn_pruning.measure import count_macs

import torch

try:
    from long_runs import whole_tables
except ImportError:  # run as a program
    import whole_tables

SEEDS = tuple(range(10))  # of the documented run
CHANNELS = (8, 16)
TRAINING = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
REMOVE = 7  # filters
TABLE = whole_tables.FOLDER / "seeds.csv"


def settings(seeds: list[int]) -> dict:
    return {"seeds": [*seeds], "channels": [*CHANNELS], "training": TRAINING, "remove": REMOVE}


def compare(seed: int, splits: tuple) -> list[dict]:
    """Train the networks of one seed; return a row for each."""
    train, val, test = splits
    rows = []

    def add(name: str, model: CNN) -> None:
        row = {"seed": seed, "network": name, "channels": "-".join(map(str, model.channels))}
        accuracies = {"val_accuracy": evaluate(model, val)[1]}
        if name != "pruned":
            accuracies["test_accuracy"] = evaluate(model, test)[1]
        rows.append(row | accuracies)

    def train_more(model: CNN, epochs: int = TRAINING["epochs"]) -> None:
        fit(model, train, val, seed=seed, **TRAINING | {"epochs": epochs})

    model, _ = baseline(*splits, channels=CHANNELS, seed=seed, **TRAINING)
    add("baseline", model)
    pruner = TaylorPruner(model)
    pruner.score(train)
    small = pruner.prune(REMOVE)
    add("pruned", small)
    scratch_rest = round(TRAINING["epochs"] * (count_macs(model) / count_macs(small) - 1))
    train_more(small)
    add("fine-tuned", small)

    generator = torch.Generator().manual_seed(seed)
    by_chance = {
        layer: torch.rand(len(scores), generator=generator)
        for layer, scores in pruner.scores.items()
    }
    random = remove_filters(model, select_filters(by_chance, REMOVE))
    train_more(random)
    add("random, fine-tuned", random)

    taylors = {layer: len(filters) for layer, filters in pruner.select(REMOVE).items()}
    matched = {layer: by_chance[layer].argsort()[:n].tolist() for layer, n in taylors.items()}
    random = remove_filters(model, matched)
    train_more(random)
    add("random in the same layers, fine-tuned", random)

    train_more(model)
    add("baseline, more epochs", model)

    torch.manual_seed(seed)
    scratch = CNN(small.channels)
    train_more(scratch)
    train_more(scratch)
    add("scratch, same epochs", scratch)
    train_more(scratch, scratch_rest)
    add("scratch, same compute", scratch)
    return rows


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    rows = [row for seed in seeds for row in compare(seed, splits)]
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))


if __name__ == "__main__":
    main()
