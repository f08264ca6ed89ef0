"""What scoring costs as the data, the widths and the depth grow.

    python tests/benchmarks/size.py tests/benchmarks/size.png      5 minutes on two cores

Saves the picture there, and prints its figures. A slope of 1 is linear: twice as much takes twice
as long. Below 1, the larger one makes better use of the processor. "In layers" is the share of the
time within convolutions and linear layers, by PyTorch's profiler. The rest goes to activations,
pooling and the score itself.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler looks for a GPU, and complains

import matplotlib.pyplot as plt
import measuring
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cnn_pruning import (
    CNN,
    filter_scores,
    plots,
)
from cnn_pruning.measure import count_macs

IMAGES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000)
WIDTHS = (8, 16, 32, 64, 128, 256)  # of the first layer; the second has twice as many
VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLED = (2, 4, 7, 10, 13)  # behind these convolutions of VGG-16
DEPTHS = range(2, 14)


def vgg(depth: int) -> nn.Sequential:
    """The first convolutions of VGG-16, as for images of 32 x 32, and a linear layer."""
    layers, channels = [], 3
    for number, width in enumerate(VGG[:depth], start=1):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number in POOLED else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def random_images(count: int, shape: tuple[int, ...]) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(torch.rand(count, *shape, generator=generator), labels)


def share_in_layers(score: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        score()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    layers = ("convolution", "aten::mm", "aten::addmm")
    return sum(t for key, t in times.items() if any(part in key for part in layers)) / sum(
        times.values()
    )


def curve(
    points: dict[str, tuple[float, int, Callable[[], object]]], options: argparse.Namespace
) -> list[dict[str, float | str]]:
    """Time each point, (size, images scored, scoring); return size, seconds per 1,000 images."""
    times = measuring.in_turns(
        {name: score for name, (_, _, score) in points.items()}, options.repeats, options.clock
    )
    rows = []
    for name, (size, images, score) in points.items():
        each = [1000 * seconds / images for seconds in times[name]]
        row = {"": name, "size": size, "images": images, "each": statistics.median(each)}
        rows.append(row | {"spread": measuring.spread(each), "layers": share_in_layers(score)})
    return rows


def by_images(options: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    model = CNN((8, 16))
    whole = random_images(max(options.images), CNN.IMAGE_SHAPE)
    return curve(
        {
            f"{n:,}": (n, n, partial(filter_scores, model, TensorDataset(*whole[:n])))
            for n in options.images
        },
        options,
    )


def by_macs(
    networks: dict[str, nn.Module], shape: tuple[int, ...], options: argparse.Namespace
) -> list[dict]:
    """As many images for each network that all have about as much to do."""
    points = {}
    for name, model in networks.items():
        macs = count_macs(model, shape)
        images = min(2_000, max(32, round(options.gmacs * 1e9 / macs / 32) * 32))
        score = partial(filter_scores, model, random_images(images, shape))
        points[name] = (macs, images, score)
    return curve(points, options)


def print_table(name: str, rows: list[dict]) -> None:
    """The slope is that of the time against the size; of the time for all images, by images.

    It leads to the last row that is smaller by a fifth at least: between two of nearly the same
    size, it would tell the noise.
    """
    table, smaller = [], []
    for row in rows:
        cost = row["each"] * (row["size"] if name == "images" else 1)
        cells = {name: row[""], "multiply-adds": f"{row['size']:.3g}", "scored": row["images"]}
        if name == "images":
            cells = {name: row[""]}
        cells |= {"s for 1,000 images": row["spread"], "in layers": f"{row['layers']:.0%}"}
        before = [point for point in smaller if point[0] <= 0.8 * row["size"]]
        if before:
            slope = math.log(cost / before[-1][1]) / math.log(row["size"] / before[-1][0])
            cells["slope"] = f"{slope:.2f}"
        smaller.append((row["size"], cost))
        table.append(cells)
    print(measuring.markdown(table), end="\n\n")


def draw(images: list[dict], widths: list[dict], depths: list[dict]) -> plt.Figure:
    plots.use_style()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    x = [row["size"] for row in images]
    y = [row["each"] * row["images"] / 1000 for row in images]
    axes[0].plot(x, y, "o-", color=plots.LAYERS[0])
    axes[0].plot(x, [y[-1] * size / x[-1] for size in x], ":", color=plots.INK, label="linear")
    axes[0].set(xlabel="images", ylabel="seconds", title="By images, 8-16 filters")
    for rows, label, color in (
        (widths, "8-16 to 256-512 filters, 28 × 28", plots.LAYERS[0]),
        (depths, "VGG-16 to depth 2 to 13, 32 × 32", plots.LAYERS[1]),
    ):
        x, y = [row["size"] / 1e6 for row in rows], [row["each"] for row in rows]
        axes[1].plot(x, y, "o-", color=color, label=label)
        axes[1].plot(x, [y[-1] * size / x[-1] for size in x], ":", color=plots.INK)
    axes[1].set(
        xlabel="million multiply-adds of a forward pass",
        ylabel="seconds for 1,000 images",
        title="By network",
    )
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:,g}")
            scale.set_minor_formatter("")
        axis.legend()
    plots.headline(figure, "What scoring costs, against linear cost (dotted)")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("picture", type=Path, help="where the PNG goes")
    add("--images", type=int, nargs="+", default=IMAGES)
    add("--widths", type=int, nargs="+", default=WIDTHS)
    add("--depths", type=int, nargs="+", default=DEPTHS)
    add("--gmacs", type=float, default=25, help="billions of multiply-adds for each network")
    measuring.add_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cnns = {f"{width}-{2 * width}": CNN((width, 2 * width)) for width in options.widths}
    vggs = {f"{depth}": vgg(depth) for depth in options.depths}
    with measuring.watched():
        images = by_images(options)
        widths = by_macs(cnns, CNN.IMAGE_SHAPE, options)
        depths = by_macs(vggs, (3, 32, 32), options)
        for name, rows in {"images": images, "filters": widths, "convolutions": depths}.items():
            print_table(name, rows)
    options.picture.write_bytes(plots.png(draw(images, widths, depths)))


if __name__ == "__main__":
    main()
