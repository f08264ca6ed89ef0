"""How fast scoring, evaluation, the oracle, training and the command are, beside plain ways.

    python tests/benchmarks/speed.py                         all parts, 20 minutes on two cores
    python tests/benchmarks/speed.py scoring --images 5000   one part, on fewer images

In each part, the ways to do the same take turns, on the same data and threads. A cell has the
median, and in parentheses the lowest and the highest value. Let nothing else run meanwhile; what
ran is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import measuring
import torch
from reference import one_by_one, train_epoch
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.utils.data import Subset, TensorDataset

from cnn_pruning import CNN, evaluate, fashion_mnist, filter_scores, fit, remove_filters
from cnn_pruning.experiments.data import batches
from cnn_pruning.measure import latency
from cnn_pruning.oracle import oracle

FOLDER = Path(__file__).parent
BATCH_SIZES = (64, 256, 1024, 4096, 10_000)
SEVEN = {"network.0": [0], "network.2": [0, 1, 2, 3, 4, 5]}  # as many as the tutorial removes


splits = cache(fashion_mnist)


def network() -> CNN:
    torch.manual_seed(0)
    return CNN((8, 16))


# Scoring


def plain_pass(model: CNN, data: TensorDataset, batch_size: int) -> None:
    """Forward and backward, with the gradient of every weight: what training does, less the step.

    So is scoring with the gradients of weights, before their scores are computed.
    """
    model.zero_grad()
    for images, labels in batches(data, batch_size):
        cross_entropy(model(images), labels).backward()


def torch_pruning_scores(model: CNN, data: TensorDataset, batch_size: int) -> list:
    """The Taylor importance of Torch-Pruning, with gradients that add up over the batches."""
    import torch_pruning

    convs = [layer for layer in model.network if isinstance(layer, torch.nn.Conv2d)]
    graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1][0])
    plain_pass(model, data, batch_size)
    importance = torch_pruning.importance.GroupTaylorImportance()
    return [
        importance(
            graph.get_pruning_group(
                conv, torch_pruning.prune_conv_out_channels, list(range(conv.out_channels))
            )
        )
        for conv in convs
    ]


SCORING: dict[str, Callable] = {
    "filter_scores": lambda model, data, size: filter_scores(model, data, batch_size=size),
    "plain pass": plain_pass,
    "Torch-Pruning": torch_pruning_scores,
}


def scoring(options: argparse.Namespace) -> None:
    data = TensorDataset(*splits()[0][: options.images or 20_000])
    model = network()
    rows = []
    for size in options.batch_sizes:
        ways = {name: partial(way, model, data, size) for name, way in SCORING.items()}
        times = measuring.in_turns(ways, options.repeats, options.clock)
        rows.append({"batch": size} | measuring.against("filter_scores", times))
    print(f"## Scoring of {len(data):,} images, CNN((8, 16))\n")
    print(measuring.markdown(rows), end="\n\n")


def peaks(options: argparse.Namespace) -> None:
    """Needs Linux, but no quiet machine."""
    rows = [
        {"batch": size} | {f"{name} (MB)": f"{apart(peak, name, size):.0f}" for name in SCORING}
        for size in options.batch_sizes
    ]
    print("## By how much the memory of a fresh process grows when it scores 10,000 images\n")
    print(measuring.markdown(rows), end="\n\n")


def peak(way: str, batch_size: int) -> float:
    """By how many MB the resident memory of this process grows, at its peak, in a scoring pass.

    The images themselves and a pass over a few of them are not counted.
    """
    data, model = splits()[2], network()
    SCORING[way](model, TensorDataset(*data[:64]), 64)
    measuring.give_back()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    SCORING[way](model, data, batch_size)
    return (status("VmHWM") - before) / 1e6


def status(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def apart(function: Callable, *arguments: object) -> object:
    """Return what ``function`` returns in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(threaded, torch.get_num_threads(), function, *arguments).result()


def threaded(threads: int, function: Callable, *arguments: object) -> object:
    torch.set_num_threads(threads)
    return function(*arguments)


# Evaluation and the oracle


@torch.no_grad()
def plain_evaluation(model: CNN, data: TensorDataset, batch_size: int) -> tuple[float, float]:
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in batches(data, batch_size):
        logits = model(images)
        loss += cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(data), correct / len(data)


def evaluation(options: argparse.Namespace) -> None:
    data = TensorDataset(*splits()[0][: options.images or 20_000])
    model = network()
    rows = []
    for size in options.batch_sizes:
        ways = {
            "evaluate": partial(evaluate, model, data, size),
            "plain loop": partial(plain_evaluation, model, data, size),
        }
        times = measuring.in_turns(ways, options.repeats, options.clock)
        rows.append({"batch": size} | measuring.against("evaluate", times))
    print(f"## Evaluation on {len(data):,} images, CNN((8, 16))\n")
    print(measuring.markdown(rows), end="\n\n")


def plain_oracle(model: CNN, data: TensorDataset) -> dict[str, list[float]]:
    """Each filter in turn has its weights and bias set to zero, and the network is evaluated."""
    base, _ = plain_evaluation(model, data, 128)
    changes: dict[str, list[float]] = {}
    for name in SEVEN:
        conv = model.get_submodule(name)
        for k in range(conv.out_channels):
            kept = conv.weight.detach()[k].clone(), conv.bias.detach()[k].clone()
            with torch.no_grad():
                conv.weight[k], conv.bias[k] = 0, 0
                changes.setdefault(name, []).append(plain_evaluation(model, data, 128)[0] - base)
                conv.weight[k], conv.bias[k] = kept
    return changes


def the_oracle(options: argparse.Namespace) -> None:
    data = TensorDataset(*splits()[0][: options.images or 2_000])
    model = network()
    ways = {"oracle": lambda: oracle(model, data), "plain loop": lambda: plain_oracle(model, data)}
    times = measuring.in_turns(ways, options.repeats, options.clock)
    print(f"## The oracle of 24 filters on {len(data):,} images\n")
    print(measuring.markdown([measuring.against("oracle", times)]), end="\n\n")


# Training


def training(options: argparse.Namespace) -> None:
    train, val, _ = splits()
    count = options.images or 20_000
    train, val = TensorDataset(*train[:count]), TensorDataset(*val[:100])
    singly = Subset(one_by_one(train=True), range(count))
    ways = {
        "fit": lambda: fit(network(), train, val, epochs=1),
        "fit, batch 32": lambda: fit(network(), train, val, epochs=1, batch_size=32),
        "reference": lambda: train_epoch(model := network(), Adam(model.parameters()), singly),
    }
    times = measuring.in_turns(ways, options.repeats, options.clock)
    print(f"## An epoch on {count:,} images (reference: image by image, batch 32)\n")
    print(measuring.markdown([measuring.against("fit", times)]), end="\n\n")


# Latency


def two_latencies(batch_size: int) -> list[tuple[float, float, float]]:
    large = network()
    return latency(large, remove_filters(large, SEVEN), batch_size=batch_size)


def latencies(options: argparse.Namespace) -> None:
    rows = []
    for size in (1, 512):
        for process in range(3):
            large, small = apart(two_latencies, size)
            rows.append(
                {
                    "batch": size,
                    "process": process + 1,
                    "24 filters (ms)": "{:.3g} ({:.3g} to {:.3g})".format(*large),
                    "17 filters (ms)": "{:.3g} ({:.3g} to {:.3g})".format(*small),
                    "ratio": f"{large[0] / small[0]:.2f}",
                }
            )
    print("## Latency in three processes (median and quartiles)\n")
    print(measuring.markdown(rows), end="\n\n")


# The whole experiment


def command(options: argparse.Namespace) -> None:
    """``python -m cnn_pruning`` and the same experiment as a tutorial would write it, in turns.

    Each starts as a user starts it, in a process of its own; the command has a store that is new.
    """
    programs = {"command": "stages.py", "reference": "reference.py"}
    found: dict[str, list[dict]] = {name: [] for name in programs}
    for seed in range(1, 1 + options.runs):
        for name, program in programs.items():
            found[name].append(experiment(program, seed, options))
    rows = []
    for name, runs in found.items():
        stages = {
            stage: statistics.median(run["stages"][stage] for run in runs)
            for stage in runs[0]["stages"]
        }
        rows.append(
            {
                "": name,
                "s": measuring.spread([run["seconds"] for run in runs]),
                "test accuracy": " / ".join(f"{run['accuracy']:.2%}" for run in runs),
                "where (s)": ", ".join(f"{stage} {each:.1f}" for stage, each in stages.items()),
            }
        )
    epochs = f"{options.epochs} + {options.epochs} epochs"
    print(f"## The experiment, {epochs}, seeds 1 to {options.runs}\n")
    print(measuring.markdown(rows), end="\n\n")


def experiment(program: str, seed: int, options: argparse.Namespace) -> dict:
    """Run a program that ends with a line of JSON; return that, and the seconds of all."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "DO_NOT_TRACK": "true",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        clock = options.clock
        started = [FOLDER / program, str(seed), str(options.epochs), clock.__name__]
        if clock is time.process_time:
            clock = of_children
        start = clock()
        done = subprocess.run(
            [sys.executable, *started], env=environment, cwd=folder, capture_output=True, text=True
        )
        seconds = clock() - start
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        found["stages"]["the rest"] = seconds - sum(found["stages"].values())
        return found | {"seconds": seconds}


def of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


PARTS = {
    "scoring": scoring,
    "peaks": peaks,
    "evaluation": evaluation,
    "oracle": the_oracle,
    "training": training,
    "latency": latencies,
    "command": command,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="*", choices=[[], *PARTS], help="by default, all")
    add("--images", type=int, help="instead of 20,000, or 2,000 for the oracle")
    add("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    measuring.add_options(parser)
    add("--epochs", type=int, default=5, help="of the command, before and after pruning")
    add("--runs", type=int, default=2, help="of the command")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for part in options.parts or PARTS:
        with measuring.watched():
            PARTS[part](options)


if __name__ == "__main__":
    main()
