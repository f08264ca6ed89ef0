"""The comparison of notebook 5 over several seeds: ``python -m cnn_pruning.seeds 0 1 2 3 4``.

It takes about three minutes a seed on two cores and writes ``notebooks/seeds.csv``: one row a
network, with its validation and test accuracy.
"""

import sys

import pandas as pd
import torch

from cnn_pruning import CNN, TaylorPruner, evaluate, fashion_mnist, fit, tracking
from cnn_pruning.measure import count_macs
from cnn_pruning.paths import ROOT

SETTINGS = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
REMOVE = 7


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

    def train_more(model: CNN, epochs: int = SETTINGS["epochs"]) -> None:
        fit(model, train, val, seed=seed, **SETTINGS | {"epochs": epochs})

    model, _ = tracking.baseline(*splits, seed=seed, **SETTINGS)
    add("baseline", model)
    pruner = TaylorPruner(model)
    pruner.score(train)
    small = pruner.prune(REMOVE)
    add("pruned", small)
    scratch_rest = round(SETTINGS["epochs"] * (count_macs(model) / count_macs(small) - 1))
    train_more(small)
    add("fine-tuned", small)

    control = TaylorPruner(model, normalize=False)
    generator = torch.Generator().manual_seed(seed)
    control.scores = {
        layer: torch.rand(len(scores), generator=generator)
        for layer, scores in pruner.scores.items()
    }
    random = control.prune(REMOVE)
    train_more(random)
    add("random, fine-tuned", random)

    train_more(model)
    add("baseline, trained on", model)

    torch.manual_seed(seed)
    scratch = CNN(small.channels)
    train_more(scratch)
    train_more(scratch)
    add("scratch, same epochs", scratch)
    train_more(scratch, scratch_rest)
    add("scratch, same compute", scratch)
    return rows


if __name__ == "__main__":
    splits = fashion_mnist()
    seeds = [int(seed) for seed in sys.argv[1:]]
    rows = [row for seed in seeds for row in compare(seed, splits)]
    pd.DataFrame(rows).to_csv(ROOT / "notebooks" / "seeds.csv", index=False)
