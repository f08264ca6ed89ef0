"""What training between removals buys, for notebook 7.

    uv run python notebooks/long_runs/updates.py

takes about a quarter of an hour on two cores and writes updates.csv: a row for each network on the
way of two of the schedules, with other numbers of updates between removals.
"""

from cnn_pruning import fashion_mnist
from cnn_pruning.baseline import baseline

try:
    from long_runs import schedules, whole_tables
except ImportError:  # run as a program
    import schedules
    import whole_tables

SEEDS = (0, 1, 2)  # of the documented run
UPDATES = (0, 10, 100)  # schedules.csv has the way with 30
METHODS = ("taylor", "random")
TABLE = whole_tables.FOLDER / "updates.csv"


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "baseline": schedules.settings(seeds)["baseline"],
        "updates": [*UPDATES],
        "training": schedules.TRAINING,
        "methods": [*METHODS],
    }


def on_the_way(seed: int, splits: tuple) -> list[dict]:
    model, _ = baseline(*splits, seed=seed, **schedules.BASELINE)
    return [
        schedules.row(step, seed=seed, method=method, updates=updates)
        for method in METHODS
        for updates in UPDATES
        for step in schedules.schedule(model, *splits[:2], method, updates, seed)
    ]


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    rows = [row for seed in seeds for row in on_the_way(seed, splits)]
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))


if __name__ == "__main__":
    main()
