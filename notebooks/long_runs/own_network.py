"""The long version of notebook 9, first part: a network with batch norm and pooling.

    uv run python notebooks/long_runs/own_network.py

takes about forty minutes on two cores. It trains the network, prunes it step by step by several
criteria, with the multiply-adds that a removal saves as its cost, and writes own_network.csv, one
row a network, and own_network.pt, the first seed's trained network.
"""

import copy
from collections.abc import Callable

from cnn_pruning import evaluate, fashion_mnist, fit, normalize
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, filter_costs
from cnn_pruning.scores import Scores

import torch
from torch import nn

try:
    from long_runs import whole_tables
    from long_runs.networks import Net
except ImportError:  # run as a program
    import whole_tables
    from networks import Net

SEEDS = (0, 1, 2)  # of the documented run
LAYERS = ("conv1", "conv2", "conv3")
IMAGE_SHAPE = (1, 28, 28)
BASELINE = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
SCHEDULE = {"per_step": 6, "updates": 20, "batch_size": 128, "lr": 1e-3}
FINE_TUNE = {"epochs": 4, "batch_size": 128, "lr": 3e-3}
COST = 1.0  # how much of a normalized score a million multiply-adds weigh
SHARES = (0.75, 0.5, 0.35, 0.25, 0.13)  # of the network's MACs
FINAL = 0.13
CRITERIA = {"taylor": "taylor", "weight": "weight", "random": "random"}
TABLE = whole_tables.FOLDER / "own_network.csv"
TRAINED = whole_tables.FOLDER / "own_network.pt"


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "baseline": BASELINE,
        "schedule": SCHEDULE,
        "fine_tune": FINE_TUNE,
        "cost": COST,
        "shares": [*SHARES],
        "final": FINAL,
    }


def untrained(seed: int, widths: tuple[int, ...] = (32, 64, 128)) -> Net:
    torch.manual_seed(seed)
    return Net(widths).to(memory_format=torch.channels_last)  # trains a third faster


def macs_saved(network: nn.Module) -> dict[str, int]:
    """How many multiply-adds go with one filter of each layer, as the network is now."""
    rows = filter_costs(network, torch.rand(2, *IMAGE_SHAPE, generator=torch.Generator()))
    return {row["group"]: row["macs"] for row in rows if row["filters"] > 1}


def with_cost(weight: float) -> Callable[[nn.Module, Scores], Scores]:
    """Normalized scores, less ``weight`` for every million multiply-adds that a removal saves."""

    def rescore(network: nn.Module, scores: Scores) -> Scores:
        normalized = normalize(scores)
        saved = macs_saved(network)
        return {k: normalized[k] - weight * n / 1e6 for k, n in saved.items()}

    return rescore


def widths_of(network: nn.Module) -> tuple[int, ...]:
    return tuple(network.get_submodule(layer).out_channels for layer in LAYERS)


def rows_of_seed(seed: int, train, val, test) -> tuple[list[dict], Net]:
    rows = []

    def add(method: str, share: float, network: nn.Module, epochs: float, tuned: bool) -> None:
        rows.append(
            {
                "seed": seed,
                "method": method,
                "share": share,
                "widths": "-".join(map(str, widths_of(network))),
                "macs": count_macs(network, IMAGE_SHAPE),
                "epochs": epochs,
                "val_accuracy": evaluate(network, val)[1],
                "test_accuracy": evaluate(network, test)[1] if tuned else None,
            }
        )

    model = untrained(seed)
    fit(model, train, val, seed=seed, **BASELINE)
    trained = copy.deepcopy(model)
    add("baseline", 1.0, model, BASELINE["epochs"], True)
    whole = count_macs(model, IMAGE_SHAPE)
    for method, criterion in CRITERIA.items():
        torch.manual_seed(seed)  # for the random scores
        shares, removals = [*SHARES], 0
        for step in prune_iteratively(
            model,
            train,
            val,
            macs=int(FINAL * whole),
            criterion=criterion,
            rescore=with_cost(COST),
            seed=seed,
            **SCHEDULE,
        ):
            while shares and step.macs <= shares[0] * whole:
                add(method, shares.pop(0), step.model, 0, False)
            removals += 1
        fit(step.model, train, val, seed=seed, **FINE_TUNE)
        add(f"{method}, fine-tuned", FINAL, step.model, FINE_TUNE["epochs"], True)
        if method == "taylor":
            widths = widths_of(step.model)
            updates = removals * SCHEDULE["updates"] * SCHEDULE["batch_size"] / len(train)
            epochs = round(BASELINE["epochs"] + updates + FINE_TUNE["epochs"])

    # The same architecture from scratch, for as many epochs as the pruned network has had: its
    # own, and those of the network that it comes from.
    scratch = untrained(seed, widths)
    fit(scratch, train, val, seed=seed, **BASELINE | {"epochs": epochs})
    add("scratch, same epochs", FINAL, scratch, epochs, True)
    fit(model, train, val, seed=seed, **FINE_TUNE)
    add("baseline, trained on", 1.0, model, FINE_TUNE["epochs"], True)
    return rows, trained


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    rows = []
    for seed in seeds:
        more, trained = rows_of_seed(seed, *splits)
        rows += more
        if seed == seeds[0]:
            first = trained
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))
    torch.save(first.state_dict(), folder / TRAINED.name)


if __name__ == "__main__":
    main()
