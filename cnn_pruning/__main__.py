"""The whole experiment without a notebook: train, score, select, remove, fine-tune."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pandas as pd
import torch
from torch.utils.data import TensorDataset
from torchinfo import summary

from cnn_pruning import (
    CNN,
    evaluate,
    fashion_mnist,
    filter_scores,
    normalize,
    plots,
    remove_filters,
    select_filters,
    tracking,
)
from cnn_pruning.alive import signals_interrupt
from cnn_pruning.baseline import fit_and_log
from cnn_pruning.experiments import ranks
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import costs
from cnn_pruning.scores import Filters

PROGRAM = "python -m cnn_pruning"

# Options


def refuse(message: str) -> NoReturn:
    """Exit with status 2 and ``message`` in one line."""
    ranks.say(f"{PROGRAM}: {' '.join(message.split())}")
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(
                f"{text[:20]!r} is not an integer from {lowest} to {highest}"
            )
        return int(text)

    return read


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number up to 1")
    return value


def device(text: str) -> torch.device:
    try:
        found = torch.empty(0, device=text).device
        if found.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        return found
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a device of this machine: use 'cpu', or 'cuda' if it has one"
        ) from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the options; exit with status 2 and one line if one can't be used."""
    parser = Parser(
        prog=PROGRAM,
        description="Train a CNN on FashionMNIST, score its filters with the Taylor criterion, "
        "remove the lowest, and fine-tune. MLflow tracks every step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--channels",
        type=integer(1, 1024),
        nargs="+",
        default=[8, 16],
        help="filters of each layer",
    )
    add("--remove", type=integer(0, 1_000_000), default=7, help="filters to remove")
    add(
        "--updates",
        type=integer(0, 1_000_000),
        default=None,
        help="remove step by step, with this many updates before each step; without this option, "
        "remove all in one shot",
    )
    add("--per-step", type=integer(1, 1024), default=1, help="filters per step, with --updates")
    add("--epochs", type=integer(1, 10_000), default=5, help="epochs of training")
    add("--fine-tune-epochs", type=integer(0, 10_000), default=5, help="epochs after pruning")
    add("--batch-size", type=integer(1, 60_000), default=128, help="images in a mini-batch")
    add("--lr", type=rate, default=3e-3, help="learning rate at the start of both trainings")
    add(
        "--seed",
        type=integer(0, 2**63 - 1),
        default=1,
        help="decides the first weights and the order of the images",
    )
    add(
        "--device",
        type=device,
        default="cpu",
        help="where to compute; under torchrun, 'cuda' is a GPU for each process",
    )
    add("--data", type=Path, default=None, help="folder of the data set, if not the project's")
    options = parser.parse_args(arguments)
    if options.remove > sum(options.channels) - len(options.channels):
        parser.error(
            f"argument --remove: {options.remove} of {sum(options.channels)} filters can't go, "
            f"because each of the {len(options.channels)} layers keeps at least one"
        )
    return options


# The experiment

FORMATS = {
    "filters": "{:.0f}".format,
    "parameters": "{:,.0f}".format,
    "MACs": "{:,.0f}".format,
    "ms, batch 1": "{:.2f}".format,
    "ms, batch 512": "{:.1f}".format,
    "val accuracy": "{:.2%}".format,
    "test accuracy": "{:.2%}".format,
}


def accuracies(model: CNN, val: TensorDataset, test: TensorDataset) -> dict[str, float]:
    return {"val accuracy": evaluate(model, val)[1], "test accuracy": evaluate(model, test)[1]}


def show(what: str, figure: plots.Figure, name: str) -> None:
    print(f"{what}: {tracking.log_figure(figure, name)}")


def prune_in_one_shot(
    model: CNN, train: TensorDataset, val: TensorDataset, options: argparse.Namespace
) -> tuple[CNN, Filters]:
    scores = normalize(filter_scores(model, train))
    removed = select_filters(scores, options.remove)
    small = remove_filters(model, removed)
    if ranks.is_first():
        figure = plots.score_bars(scores, "normalized score", "Hatched: removed", removed)
        show("scores of all filters", figure, "scores.png")
    val_loss, val_accuracy = evaluate(small, val)
    tracking.log_metrics({"val_loss": val_loss, "val_accuracy": val_accuracy})
    return small, removed


def prune_step_by_step(
    model: CNN, train: TensorDataset, val: TensorDataset, options: argparse.Namespace
) -> tuple[CNN, Filters]:
    """Log one MLflow step per removal, so that MLflow can draw accuracy against what is left."""
    tracking.log_settings({"updates": options.updates, "per_step": options.per_step})
    small = remove_filters(model, {})
    removed: Filters = {}
    steps = prune_iteratively(
        model,
        train,
        val,
        filters=sum(options.channels) - options.remove,
        per_step=options.per_step,
        updates=options.updates,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    left, accuracy = [sum(options.channels)], [evaluate(model, val)[1]]
    for number, step in enumerate(steps, start=1):
        small = step.model
        left.append(step.filters)
        accuracy.append(step.val_accuracy)
        for layer, filters in step.removed.items():
            removed.setdefault(layer, []).extend(filters)
        names = ("val_loss", "val_accuracy", "filters", "parameters", "macs")
        tracking.log_metrics({name: getattr(step, name) for name in names}, number)
    if ranks.is_first():
        show(
            "accuracy by removed filters",
            plots.accuracy_by_removed(
                [left[0] - count for count in left],
                {"taylor": torch.tensor([accuracy])},
                "Right after each removal",
                xlabel=f"filters removed, {options.updates} updates before each step",
            ),
            "accuracy.png",
        )
    return small, removed


def experiment(
    options: argparse.Namespace, train: TensorDataset, val: TensorDataset, test: TensorDataset
) -> None:
    settings = {"batch_size": options.batch_size, "lr": options.lr, "seed": options.seed}
    rows = {}

    about = {"channels": options.channels, "remove": options.remove, "epochs": options.epochs}
    plots.use_style()
    with tracking.run(tracking.title(about | settings)) as parent:
        tracking.log_settings({"remove": options.remove, "device": options.device})

        torch.manual_seed(options.seed)
        model = CNN(options.channels).to(options.device)
        with tracking.run("train"):
            fit_and_log(model, train, val, test, epochs=options.epochs, **settings)
            if options.device.type == "cpu":  # where the notebooks would have trained it
                tracking.set_stage("baseline")
        rows["trained"] = accuracies(model, val, test)

        with tracking.run("prune"):
            tracking.log_settings({"criterion": "taylor", "removed": options.remove})
            prune = prune_in_one_shot if options.updates is None else prune_step_by_step
            small, removed = prune(model, train, val, options)
            rows["pruned"] = {"val accuracy": evaluate(small, val)[1]}
            tracking.log_dict(removed, "removed.json")
            tracking.log_network(small)

        with tracking.run("fine-tune"):
            fit_and_log(small, train, val, test, epochs=options.fine_tune_epochs, **settings)
            rows["fine-tuned"] = accuracies(small, val, test)
            tracking.log_model(small, test[:2][0])

        if not ranks.is_first():
            return
        measured = dict(zip(("trained", "fine-tuned"), costs(model, small), strict=True))
        measured["pruned"] = measured["fine-tuned"]  # one architecture
        rows = {name: measured[name] | found for name, found in rows.items()}
        for network in (model, small):
            print(summary(network.cpu(), (1, *network.IMAGE_SHAPE), verbose=0))
        for layer, filters in removed.items():
            print(f"removed from {layer}: {len(filters)} filters {filters}")
        print(f"\n{pd.DataFrame(rows).T.to_string(formatters=FORMATS, na_rep='')}")
        print(f"\n{tracking.where_to_look(parent)}")


def main(arguments: list[str] | None = None) -> int:
    try:
        with signals_interrupt():
            options = parse(arguments)
            try:
                options.device = ranks.start(options.device)
                splits = [ranks.divide(data) for data in fashion_mnist(options.data)]
                if ranks.is_first():  # after the data, because the first call makes a database
                    tracking.connect()
            except (OSError, ValueError) as error:
                refuse(str(error))
            experiment(options, *splits)
    except KeyboardInterrupt as error:
        notes = getattr(
            error, "__notes__", ["If the MLflow run had begun, it is marked as killed."]
        )
        ranks.say(" ".join(["Interrupted.", *notes]))
        return 128 + (error.args or [signal.SIGINT])[0]
    except (FloatingPointError, ranks.RankLost, tracking.NotRecorded) as error:
        ranks.say(str(error))
        return 1
    ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
