"""The ten trained networks of notebooks 6 and 8.

    uv run python notebooks/long_runs/trained.py

takes about six minutes on two cores. It trains them as notebook 2 does, for 3 epochs, and writes
trained.pt, with 16 bits a weight. They are kept because another machine would train others. The
tables of every_network.py are of the first three: run it again after this.
"""

from collections.abc import Sequence
from pathlib import Path

from cnn_pruning import CNN, fashion_mnist
from cnn_pruning.baseline import baseline

import torch

try:
    from long_runs import whole_tables
except ImportError:  # run as a program
    import whole_tables

SEEDS = tuple(range(10))  # of the documented run
CHANNELS = (8, 16)
TRAINING = {"epochs": 3, "batch_size": 128, "lr": 3e-3}
TRAINED = whole_tables.FOLDER / "trained.pt"


def networks(seeds: Sequence[int] = SEEDS, path: Path = TRAINED) -> list[CNN]:
    """Return the stored networks of these seeds, in evaluation mode.

    Raises ``ValueError`` for a seed without one.
    """
    states, found = torch.load(path, weights_only=True), []
    for seed in seeds:
        if seed not in states:
            raise ValueError(f"{path.name} has networks of the seeds {[*states]}, none of {seed}.")
        found.append(CNN(CHANNELS))
        found[-1].load_state_dict(states[seed])  # float16 into float32
    return [network.eval() for network in found]


def main(given: Sequence[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    states = {}
    for seed in seeds:
        network, _ = baseline(*splits, channels=CHANNELS, seed=seed, **TRAINING)
        states[seed] = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(states, folder / TRAINED.name)


if __name__ == "__main__":
    main()
