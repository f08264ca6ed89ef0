"""The repairs of notebook 10 over several seeds.

    uv run python notebooks/long_runs/repair.py

takes about an hour on one core and writes repair.csv: one row a network, with its
validation accuracy, and its test accuracy where the notebook claims something at the end.
"""

import copy
from collections.abc import Iterator

from cnn_pruning import (
    CNN,
    evaluate,
    fashion_mnist,
    filter_scores,
    fit,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.baseline import baseline

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

try:
    from long_runs import least_squares, whole_tables
except ImportError:  # run as a program
    import least_squares
    import whole_tables

SEEDS = tuple(range(10))  # of the documented run
BASELINE = {"channels": (8, 16), "epochs": 5, "batch_size": 128, "lr": 3e-3}
IMAGES = 5_000  # training images, without their labels, for the linear layer
CONVOLUTION_IMAGES = 1_000  # each has 784 positions
OTHER_IMAGES = (500, 1_000, 20_000)  # for the linear layer, at the most filters removed
STRENGTH = 0.1  # of the ridge: notebook 10 chooses it, on the validation images of one network
EPOCHS = {7: (1,), 16: (1, 5)}  # of fine-tuning, by the filters removed
FINE_TUNED = ("taylor", "random")
EVERY = ("none", "mean", "linear", "both")
"""The repairs: the removed maps' means go into the biases, the linear layer is refitted, or both
layers are, the second convolution first."""
FEWER = [("taylor", repair) for repair in EVERY] + [("random", "none"), ("random", "both")]
REPAIRS = {  # by the filters removed: (method, repair)
    7: FEWER,
    16: [*FEWER, *(("random", k) for k in EVERY[1:3]), ("weight", "none"), ("weight", "both")],
}
FINE_TUNE = {"batch_size": 128, "lr": 3e-3}
FINE_TUNE_IMAGES = 30_000  # in an epoch
COLUMNS = ("seed", "removed", "method", "channels", "repair", "images", "epochs")
TABLE = whole_tables.FOLDER / "repair.csv"


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "baseline": BASELINE | {"channels": [*BASELINE["channels"]]},
        "images": IMAGES,
        "convolution_images": CONVOLUTION_IMAGES,
        "other_images": [*OTHER_IMAGES],
        "strength": STRENGTH,
        "epochs": {str(removed): [*epochs] for removed, epochs in EPOCHS.items()},
        "fine_tune": FINE_TUNE,
        "fine_tune_images": FINE_TUNE_IMAGES,
    }


Filters = dict[str, list[int]]


def choices(model: CNN, train: TensorDataset, seed: int) -> dict[int, dict[str, Filters]]:
    """By the number of filters removed, what each method removes.

    All take as many filters of each layer as Taylor.
    """
    taylor = normalize(filter_scores(model, train))
    weight = filter_scores(model, train, "weight")
    generator = torch.Generator().manual_seed(seed)
    random = {k: torch.rand(len(scores), generator=generator) for k, scores in taylor.items()}

    def lowest(scores: dict[str, Tensor], like: Filters) -> Filters:
        return {k: scores[k].argsort()[: len(filters)].tolist() for k, filters in like.items()}

    found = {}
    for removed in EPOCHS:
        like = select_filters(taylor, removed)
        others = {"weight": lowest(weight, like), "random": lowest(random, like)}
        found[removed] = {"taylor": like} | others
    return found


def repaired(model: CNN, removed: Filters, repair: str, images: Tensor) -> CNN:
    """Remove filters and repair what is left: see ``REPAIRS``."""
    small = remove_filters(model, removed)
    kept = [k for k in range(model.channels[1]) if k not in removed["network.2"]]
    if repair == "mean":
        return least_squares.with_means_absorbed(small, model, removed, kept, images)
    if repair == "both":
        few = images[:CONVOLUTION_IMAGES]
        small = least_squares.with_convolution_refitted(small, model, kept, few)
    if repair in ("linear", "both"):
        return least_squares.with_linear_refitted(small, model, images, STRENGTH)
    return small


def untrained(channels: tuple[int, ...], model: CNN, images: Tensor, seed: int) -> CNN:
    """Random convolutions of these widths; only the linear layer is fitted, from zero."""
    torch.manual_seed(seed)
    network = CNN(channels)
    for parameter in network.network[-1].parameters():
        parameter.data.zero_()
    return least_squares.with_linear_refitted(network, model, images, STRENGTH)


def networks(
    model: CNN, train: TensorDataset, val: TensorDataset, seed: int
) -> Iterator[tuple[CNN, dict, bool]]:
    """Every network of a seed, its columns of the table, and whether it is tested."""
    yield model, {"method": "whole", "removed": 0, "repair": "none"}, True
    images, part = train.tensors[0], TensorDataset(*train[:FINE_TUNE_IMAGES])
    for removed, by_method in choices(model, train, seed).items():
        for method, repair in REPAIRS[removed]:
            small = repaired(model, by_method[method], repair, images[:IMAGES])
            of = {"removed": removed, "method": method, "repair": repair}
            of |= {"images": 0 if repair == "none" else IMAGES}
            final = repair in ("none", "both")
            yield small, of, final
            for epochs in EPOCHS[removed] if final and method in FINE_TUNED else ():
                tuned = copy.deepcopy(small)
                fit(tuned, part, val, epochs=epochs, seed=seed, **FINE_TUNE)
                yield tuned, of | {"epochs": epochs}, True
    of = {"removed": removed, "method": "taylor", "repair": "both"}  # at the most removed
    for number in OTHER_IMAGES:
        few_or_many = repaired(model, by_method["taylor"], "both", images[:number])
        yield few_or_many, of | {"images": number}, False
    of |= {"method": "untrained", "repair": "linear", "images": IMAGES}
    yield untrained(small.channels, model, images[:IMAGES], seed), of, False


def compare(seed: int, splits: tuple) -> list[dict]:
    """Make every network of one seed; return a row for each."""
    train, val, test = splits
    model, _ = baseline(*splits, seed=seed, **BASELINE)
    rows = []
    for network, columns, final in networks(model, train, val, seed):
        row = dict.fromkeys(COLUMNS, 0) | {"seed": seed} | columns
        row["channels"] = "-".join(map(str, network.channels))
        row["val_accuracy"] = evaluate(network, val)[1]
        row["test_accuracy"] = evaluate(network, test)[1] if final else None
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    rows = [row for seed in seeds for row in compare(seed, splits)]
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))


if __name__ == "__main__":
    main()
