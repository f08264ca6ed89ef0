"""The repairs of notebook 10 over several seeds.

    uv run python notebooks/long_runs/repair.py

takes two hours of one core; a GPU is used if there is one. It writes repair.csv: one row a
network, with its validation accuracy, and its test accuracy where the notebook claims something at
the end. Each row is kept as soon as it is done: started again, the program goes on where it
stopped.

What is tested, stated before the run: the eleven paired differences of ``TESTED``, with 16 filters
removed, corrected together (Bonferroni). Everything else in the table, all that is said of 7
filters included, is described and not tested.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

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

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

try:
    from long_runs import least_squares, whole_tables
    from long_runs.machine import DEVICE, on_device, trained_once
except ImportError:  # run as a program
    import least_squares
    import whole_tables
    from machine import DEVICE, on_device, trained_once

SEEDS = tuple(range(10))  # of the documented run
CHANNELS = (8, 16)
TRAINING = {"batch_size": 128, "lr": 3e-3}  # of the baseline and of the fine-tuning
BASELINE_EPOCHS = 5
IMAGES = 5_000  # training images, without their labels, for the linear layer
CONVOLUTION_IMAGES = 1_000  # each has 784 positions
OTHER_IMAGES = (500, 1_000, 20_000)  # for the linear layer, at the most filters removed
STRENGTH = 0.1  # of the ridge: notebook 10 chooses it, on the validation images of one network
EPOCHS = {7: (1,), 16: (1, 5)}  # of fine-tuning, by the filters removed
METHODS = ("taylor", "weight", "random")  # all take as many filters of each layer as Taylor
EVERY = ("none", "mean", "linear", "both")
"""The repairs: the removed maps' means go into the biases, the linear layer is refitted, or both
layers are, the second convolution first."""
REPAIRS = {7: ("none", "both"), 16: EVERY}  # by the filters removed; Taylor has all of them
FINAL = ("none", "both")  # the repairs whose networks are fine-tuned and tested

# (network, network, accuracy): the first minus the second, each (method, repair, epochs after it)
TESTED = (
    *(
        (("taylor", "both", epochs), (other, "both", epochs), "test_accuracy")
        for other in ("random", "weight")
        for epochs in (0, *EPOCHS[16])
    ),
    *((("taylor", "both", n), ("taylor", "none", n), "test_accuracy") for n in EPOCHS[16]),
    (("taylor", "both", 0), ("taylor", "none", 1), "test_accuracy"),
    (("taylor", "linear", 0), ("pixels", "linear", 0), "val_accuracy"),
    (("untrained", "linear", 0), ("pixels", "linear", 0), "val_accuracy"),
)
COLUMNS = ("seed", "removed", "method", "repair", "images", "epochs")
TABLE = whole_tables.FOLDER / "repair.csv"


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "channels": [*CHANNELS],
        "training": TRAINING,
        "baseline_epochs": BASELINE_EPOCHS,
        "images": IMAGES,
        "convolution_images": CONVOLUTION_IMAGES,
        "other_images": [*OTHER_IMAGES],
        "strength": STRENGTH,
        "epochs": {str(removed): [*epochs] for removed, epochs in EPOCHS.items()},
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


@torch.no_grad()
def of_pixels(model: CNN, images: Tensor) -> nn.Module:
    """No convolution at all: a linear map of the image, fitted to the logits of ``model``."""
    pixels = images.flatten(1)
    linear = nn.Linear(pixels.shape[1], 10)
    goal = least_squares.outputs(model, images)
    weight, bias = least_squares.ridge(pixels, goal, STRENGTH)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), linear)


def networks(
    model: CNN, train: TensorDataset, val: TensorDataset, seed: int, rows: whole_tables.Rows
) -> Iterator[tuple[nn.Module, dict, bool]]:
    """Every network of a seed, its columns of the table, and whether it is tested.

    Fine-tuned ones are left out if ``rows`` have them. What is solved in closed form is solved on
    the CPU, where ``model`` is.
    """
    yield model, {"method": "whole", "removed": 0, "repair": "none"}, True
    images = train.tensors[0][: max(IMAGES, *OTHER_IMAGES)].cpu()
    some = images[:IMAGES]
    for removed, by_method in choices(model, train, seed).items():
        for method in METHODS:
            for repair in EVERY if method == "taylor" else REPAIRS[removed]:
                small = repaired(model, by_method[method], repair, some)
                of = {"removed": removed, "method": method, "repair": repair}
                of |= {"images": 0 if repair == "none" else IMAGES}
                yield small, of, repair in FINAL
                for epochs in EPOCHS[removed] if repair in FINAL else ():
                    if not rows.has(**of, epochs=epochs):
                        tuned = copy.deepcopy(small).to(DEVICE)
                        fit(tuned, train, val, epochs=epochs, seed=seed, **TRAINING)
                        yield tuned, of | {"epochs": epochs}, True
    of = {"removed": removed, "method": "taylor", "repair": "both"}  # at the most removed
    for number in OTHER_IMAGES:
        few_or_many = repaired(model, by_method["taylor"], "both", images[:number])
        yield few_or_many, of | {"images": number}, False
    of |= {"repair": "linear", "images": IMAGES}
    yield untrained(small.channels, model, some, seed), of | {"method": "untrained"}, False
    yield of_pixels(model, some), of | {"method": "pixels"}, False


def compare(seed: int, folder: Path, train, val, test) -> list[dict]:
    """Make every network of one seed; return a row for each."""
    rows = whole_tables.Rows(folder / "repair.part" / f"{seed}.jsonl", settings([seed]))
    if rows.has(method="pixels"):  # the last one
        return rows.rows
    torch.manual_seed(seed)
    training = TRAINING | {"epochs": BASELINE_EPOCHS, "seed": seed}
    kept = folder / "repair.part" / f"{seed}.pt"
    model = trained_once(kept, CNN(CHANNELS), lambda network: fit(network, train, val, **training))
    for network, columns, final in networks(model.cpu(), train, val, seed, rows):
        row = dict.fromkeys(COLUMNS, 0) | {"seed": seed} | columns
        if rows.has(**row):
            continue
        network = copy.deepcopy(network).to(DEVICE)
        row["channels"] = "-".join(map(str, getattr(network, "channels", ["none"])))
        row["val_accuracy"] = evaluate(network, val)[1]
        row["test_accuracy"] = evaluate(network, test)[1] if final else None
        rows.add(row)
    return rows.rows


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = on_device(fashion_mnist())
    rows = [row for seed in seeds for row in compare(seed, folder, *splits)]
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))


if __name__ == "__main__":
    main()
