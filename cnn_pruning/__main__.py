"""The whole experiment without a notebook: train, score, select, remove, fine-tune."""

import os
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pandas as pd
import torch
from torch.utils.data import TensorDataset
from torchinfo import summary

from cnn_pruning import plots, tracking
from cnn_pruning.baseline import fit_and_log
from cnn_pruning.experiments import ranks
from cnn_pruning.experiments.alive import signals_interrupt
from cnn_pruning.experiments.data import fashion_mnist
from cnn_pruning.experiments.model import CNN
from cnn_pruning.experiments.training import evaluate
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import costs
from cnn_pruning.pruner import filter_scores, remove_filters
from cnn_pruning.scores import Filters, normalize, select_filters

PROGRAM = "python -m cnn_pruning"

# Options


def refuse(message: str) -> NoReturn:
    """Exit with status 2 and ``message`` in one line."""
    ranks.say(f"{PROGRAM}: {' '.join(message.split())}")
    raise SystemExit(2)


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text.isdecimal() and len(text) <= 20 and lowest <= int(text) <= highest:
            return int(text)
        raise ArgumentTypeError(f"{text[:20]!r} is not an integer from {lowest} to {highest}")

    return read


def rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise ArgumentTypeError(f"{text!r} is not a positive number up to 1")


def device(text: str) -> torch.device:
    with suppress(RuntimeError, AssertionError, ImportError):  # what torch raises without it
        found = torch.empty(0, device=text).device
        if found.type in ("cpu", "cuda", "mps"):
            return found
    raise ArgumentTypeError(
        f"{text!r} is not a device of this machine: use 'cpu', or 'cuda' if it has one"
    )


def parse(arguments: list[str] | None) -> Namespace:
    """Read the options; exit with status 2 and one line if one can't be used."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Train a CNN on FashionMNIST, score its filters with the Taylor criterion, "
        "remove the lowest, and fine-tune. MLflow tracks every step.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.error = refuse
    add, widths, count = parser.add_argument, integer(1, 1024), integer(0, 1_000_000)
    add("--channels", type=widths, nargs="+", default=[8, 16], help="filters of each layer")
    add("--remove", type=count, default=7, help="filters to remove")
    words = "remove step by step, with this many updates before each step; without this option, "
    add("--updates", type=count, help=words + "remove all in one shot")
    add("--per-step", type=widths, default=1, help="filters per step, with --updates")
    add("--epochs", type=integer(1, 10_000), default=5, help="epochs of training")
    add("--fine-tune-epochs", type=integer(0, 10_000), default=5, help="epochs after pruning")
    add("--batch-size", type=integer(1, 60_000), default=128, help="images in a mini-batch")
    add("--lr", type=rate, default=3e-3, help="learning rate at the start of both trainings")
    words = "decides the first weights and the order of the images"
    add("--seed", type=integer(0, 2**63 - 1), default=1, help=words)
    words = "where to compute; under torchrun, 'cuda' is a GPU for each process"
    add("--device", type=device, default="cpu", help=words)
    add("--data", type=Path, help="folder of the data set, if not the project's")
    options = parser.parse_args(arguments)
    if options.remove > sum(options.channels) - len(options.channels):
        refuse(
            f"argument --remove: {options.remove} of {sum(options.channels)} filters can't go, "
            f"because each of the {len(options.channels)} layers keeps at least one"
        )
    return options


# The experiment

FORMATS = {"ms, batch 1": "{:.2f}".format, "ms, batch 512": "{:.1f}".format}
FORMATS |= {"filters": "{:.0f}".format, "parameters": "{:,.0f}".format, "MACs": "{:,.0f}".format}
FORMATS |= dict.fromkeys(("val accuracy", "test accuracy"), "{:.2%}".format)


def accuracies(model: CNN, val: TensorDataset, test: TensorDataset) -> dict[str, float]:
    return {"val accuracy": evaluate(model, val)[1], "test accuracy": evaluate(model, test)[1]}


def prune_in_one_shot(
    model: CNN, train: TensorDataset, val: TensorDataset, options: Namespace
) -> tuple[CNN, Filters]:
    scores = normalize(filter_scores(model, train))
    removed = select_filters(scores, options.remove)
    small = remove_filters(model, removed)
    if ranks.is_first():
        figure = plots.score_bars(scores, "normalized score", "Hatched: removed", removed)
        print(f"scores of all filters: {tracking.log_figure(figure, 'scores.png')}")
    val_loss, val_accuracy = evaluate(small, val)
    tracking.log_metrics({"val_loss": val_loss, "val_accuracy": val_accuracy})
    return small, removed


def prune_step_by_step(
    model: CNN, train: TensorDataset, val: TensorDataset, options: Namespace
) -> tuple[CNN, Filters]:
    """Log one MLflow step per removal, so that MLflow can draw accuracy against what is left."""
    schedule = {"updates": options.updates, "per_step": options.per_step}
    training = {"batch_size": options.batch_size, "seed": options.seed}
    tracking.log_settings(schedule)
    whole, removed = sum(options.channels), {}
    left = whole - options.remove
    gone, percent = [0], [100 * evaluate(model, val)[1]]
    model = remove_filters(model, {})
    steps = prune_iteratively(model, train, val, filters=left, **schedule, **training)
    for number, step in enumerate(steps, start=1):
        model, removed = step.model, step.gone
        gone.append(whole - step.filters)
        percent.append(100 * step.val_accuracy)
        names = ("val_loss", "val_accuracy", "filters", "parameters", "macs")
        tracking.log_metrics({name: getattr(step, name) for name in names}, number)
    if ranks.is_first():
        figure, ((axis,),) = plots.subplots(1, 1, 9, 4)
        axis.plot(gone, percent, marker="o", ms=4, color=plots.METHODS["taylor"])
        axis.axhline(10, color=plots.INK, lw=0.5, ls=":")
        axis.text(0, 11, "guessing", size=8)
        axis.set_xticks(gone[:: 1 + len(gone) // 20])
        axis.set_xlabel(f"filters removed, {options.updates} updates before each step")
        axis.set(ylabel="validation accuracy (%)", ylim=(0, 100), title="Right after each removal")
        print(f"accuracy by removed filters: {tracking.log_figure(figure, 'accuracy.png')}")
    return model, removed


def experiment(
    options: Namespace, train: TensorDataset, val: TensorDataset, test: TensorDataset
) -> None:
    settings = {"seed": options.seed, "batch_size": options.batch_size, "lr": options.lr}
    rows = {}

    first = ("seed", "remove", "channels")  # what tells experiments apart
    about = {name: value for name, value in vars(options).items() if name != "data"}
    plots.use_style()
    with tracking.experiment({name: about[name] for name in first} | about) as parent:
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
            more = {"epochs": options.fine_tune_epochs, "trained": options.epochs}
            fit_and_log(small, train, val, test, **more, **settings)
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
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of a stream that isn't a file
            stream.reconfigure(errors="replace")  # "?" for what its encoding doesn't have
    try:
        with signals_interrupt():
            options = parse(arguments)
            try:
                given = {n: value for n, value in vars(options).items() if n != "data"}
                options.device = ranks.start(options.device)
                splits = [ranks.divide(data) for data in fashion_mnist(options.data)]
                ranks.agree(splits[0], **given)
                if ranks.is_first():  # after the data, because the first call makes a database
                    tracking.connect()
            except (OSError, ValueError) as error:
                refuse(str(error))
            experiment(options, *splits)
            if sys.stdout:  # it may be closed
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        ranks.say(" ".join(["Interrupted.", *getattr(error, "__notes__", [])]))
        return 128 + (error.args or [signal.SIGINT])[0]
    except (FloatingPointError, ranks.RankLost, tracking.NotRecorded) as error:
        ranks.say(str(error))
        return 1
    except OSError as error:  # of what is printed; Python would flush it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has enough, as `head`
            return 141  # as shells have it
        ranks.say(f"The output can't be written ({error}).")
        return 1
    ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
