"""The long version of notebook 9, first part: a network with batch norm and pooling.

    uv run python notebooks/long_runs/own_network.py

takes three hours and a half of one core; a GPU is used if there is one. It trains the network,
prunes it step by step in several ways, with the multiply-adds that a removal saves as its cost, and
trains controls. It writes own_network.csv, one row a network, and own_network.pt, the first seed's
trained network; first without the training from scratch with equal compute, which takes a third of
the time. Each row is kept as soon as it is done: started again, the program goes on where it
stopped.

What is tested, stated before the run: Taylor, fine-tuned, minus each method of ``TESTED``, in test
accuracy: six paired differences over the seeds, corrected together (Bonferroni). Everything else in
the table is described and not tested.
"""

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from cnn_pruning import evaluate, fashion_mnist, fit, normalize
from cnn_pruning.iterative import Step, prune_iteratively
from cnn_pruning.measure import count_macs, filter_costs
from cnn_pruning.scores import Scores

import torch
from torch import nn

try:
    from long_runs import whole_tables
    from long_runs.machine import DEVICE, on_device, trained_once
    from long_runs.networks import Net
except ImportError:  # run as a program
    import whole_tables
    from machine import DEVICE, on_device, trained_once
    from networks import Net

SEEDS = tuple(range(5))  # of the documented run
LAYERS = ("conv1", "conv2", "conv3")
IMAGE_SHAPE = (1, 28, 28)
BASELINE = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
SCHEDULE = {"per_step": 6, "updates": 20, "batch_size": 128, "lr": 1e-3}
FINE_TUNE = {"epochs": 4, "batch_size": 128, "lr": 3e-3}
COST = 1.0  # how much of a normalized score a million multiply-adds weigh
SHARES = (0.75, 0.5, 0.35, 0.25, 0.13)  # of the network's MACs
FINAL = 0.13
SAME_LAYERS = "random, same layers"  # at each step, as many filters of each layer as Taylor
METHODS = ("taylor", "weight", SAME_LAYERS, "random")
SAME_EPOCHS, SAME_COMPUTE = "scratch, same epochs", "scratch, same compute"
MORE_EPOCHS = "baseline, more epochs"
TESTED = (
    *("baseline", MORE_EPOCHS, "weight, fine-tuned", f"{SAME_LAYERS}, fine-tuned"),
    *(SAME_EPOCHS, SAME_COMPUTE),
)
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


def as_many_as(like: Sequence[Step]) -> Callable[[nn.Module, Scores], Scores]:
    """At each step, put as many filters of each layer last as the same step of ``like`` removed."""
    counts = iter([{layer: len(ks) for layer, ks in step.removed.items()} for step in like])

    def rescore(network: nn.Module, scores: Scores) -> Scores:
        step, ranked = next(counts), {}
        for layer, values in scores.items():
            ranks = values.argsort().argsort()
            ranked[layer] = (ranks >= step.get(layer, 0)).to(values.dtype)
        return ranked

    return rescore


def schedule(model: Net, train, val, method: str, seed: int, like: Sequence[Step]) -> list[Step]:
    """The steps of ``method`` down to ``FINAL`` of the multiply-adds; ``like`` are Taylor's."""
    torch.manual_seed(seed)  # for the random scores
    options = {"criterion": "random" if method == SAME_LAYERS else method}
    options["rescore"] = as_many_as(like) if method == SAME_LAYERS else with_cost(COST)
    macs = int(FINAL * count_macs(model, IMAGE_SHAPE))
    return list(prune_iteratively(model, train, val, macs=macs, seed=seed, **SCHEDULE, **options))


def widths_of(network: nn.Module) -> tuple[int, ...]:
    return tuple(network.get_submodule(layer).out_channels for layer in LAYERS)


def rows_of_seed(seed: int, folder: Path, train, val, test, core: bool) -> tuple[list[dict], Path]:
    """Its rows, of all methods or of the ``core``, and where its trained network is kept."""
    rows = whole_tables.Rows(folder / "own_network.part" / f"{seed}.jsonl", settings([seed]))
    kept = folder / "own_network.part" / f"{seed}.pt"
    if rows.has(method=SAME_COMPUTE) or (core and rows.has(method=MORE_EPOCHS)):  # the last ones
        return rows.rows, kept
    model = trained_once(
        kept, untrained(seed), lambda network: fit(network, train, val, seed=seed, **BASELINE)
    )
    whole = count_macs(model, IMAGE_SHAPE)
    of_baseline = BASELINE["epochs"] * whole

    def add(method: str, share: float, network: nn.Module, epochs: int, compute: float) -> None:
        """A network without epochs is on its way, and not tested."""
        if rows.has(method=method, share=share):
            return
        rows.add(
            {
                "seed": seed,
                "method": method,
                "share": share,
                "widths": "-".join(map(str, widths_of(network))),
                "macs": count_macs(network, IMAGE_SHAPE),
                "epochs": epochs,
                "compute": round(compute),
                "val_accuracy": evaluate(network, val)[1],
                "test_accuracy": evaluate(network, test)[1] if epochs else None,
            }
        )

    def trained(network: nn.Module, training: dict) -> nn.Module:
        fit(network, train, val, seed=seed, **training)
        return network

    def from_scratch(method: str, epochs: int, like: dict) -> None:
        widths = tuple(map(int, like["widths"].split("-")))
        scratch = trained(untrained(seed, widths).to(DEVICE), BASELINE | {"epochs": epochs})
        add(method, FINAL, scratch, epochs, epochs * like["macs"])

    add("baseline", 1.0, model, BASELINE["epochs"], of_baseline)
    between = SCHEDULE["updates"] * SCHEDULE["batch_size"] / len(train)  # epochs a step
    names = [f"{method}, fine-tuned" for method in METHODS]
    taylors: list[Step] = []
    for method, name in zip(METHODS, names, strict=True):
        if all(rows.has(method=each) for each in names):
            break
        steps = schedule(model, train, val, method, seed, taylors)
        taylors = taylors or steps
        macs = [whole, *(step.macs for step in steps)]
        for share in SHARES:
            step = next(step for step in steps if step.macs <= share * whole)
            add(method, share, step.model, 0, 0)
        if not rows.has(method=name):
            small = trained(copy.deepcopy(steps[-1].model), FINE_TUNE)
            compute = of_baseline + between * sum(macs[:-1]) + FINE_TUNE["epochs"] * macs[-1]
            add(name, FINAL, small, FINE_TUNE["epochs"], compute)

    # Taylor's architecture from scratch, for as many epochs as the pruned network has had, those
    # of the network that it comes from included; or for as many multiply-adds.
    (like,) = (row for row in rows.rows if row["method"] == names[0])
    removed = sum(map(int, widths_of(model))) - sum(map(int, like["widths"].split("-")))
    more = round(between * -(-removed // SCHEDULE["per_step"]) + FINE_TUNE["epochs"])
    if not rows.has(method=SAME_EPOCHS):
        from_scratch(SAME_EPOCHS, BASELINE["epochs"] + more, like)
    if not rows.has(method=MORE_EPOCHS):
        longer = trained(copy.deepcopy(model), FINE_TUNE | {"epochs": more})
        add(MORE_EPOCHS, 1.0, longer, more, of_baseline + more * whole)
    if not core:
        from_scratch(SAME_COMPUTE, round(like["compute"] / like["macs"]), like)
    return rows.rows, kept


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = on_device(fashion_mnist())
    for core in (True, False):
        found = [rows_of_seed(seed, folder, *splits, core=core) for seed in seeds]
        rows = [row for some, _ in found for row in some]
        if core:  # of a run that was stopped, some seeds have more already
            rows = [row for row in rows if row["method"] != SAME_COMPUTE]
        whole_tables.write({folder / TABLE.name: rows}, settings(seeds))
        shutil.copyfile(found[0][1], folder / TRAINED.name)


if __name__ == "__main__":
    main()
