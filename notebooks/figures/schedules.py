"""The figures of notebook 7: the loop, its steps, and what updates and a final fine-tuning do."""

import math
from collections.abc import Mapping, Sequence

from cnn_pruning.iterative import Step
from cnn_pruning.plots import (
    INK,
    LAYERS,
    METHODS,
    NAMES,
    REMOVED,
    STAYS,
    bare_image,
    headline,
    label_ends,
    look,
    subplots,
)

import numpy
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor


def loop_ring(kernels: Tensor, lowest: int) -> Figure:
    """The paper's loop, drawn around the kernels (K, 3, 3) of a layer, the lowest in a frame."""
    figure, ((axis,),) = subplots(1, 1, 6.4, 4.4)
    axis.set(xlim=(-2.3, 2.3), ylim=(-1.5, 1.5), aspect="equal")
    axis.axis("off")
    stations = {
        "train a little": (90, LAYERS[0]),
        "score each filter,\nin the same passes": (0, METHODS["taylor"]),
        "remove\nthe lowest": (270, REMOVED),
        "small enough?\nIf not, again": (180, INK),
    }
    for words, (angle, color) in stations.items():
        x, y = 1.65 * math.cos(math.radians(angle)), 1.15 * math.sin(math.radians(angle))
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color, "lw": 2}
        axis.text(x, y, words, ha="center", va="center", color=INK, size=10, bbox=box)
    bow = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "connectionstyle": "arc3,rad=-0.25"}
    for x, y in ((1, 1), (1, -1), (-1, -1), (-1, 1)):  # clockwise, from the top
        ends = [(0.75 * x, 1.15 * y), (1.6 * x, 0.5 * y)]
        axis.annotate("", ends[x * y > 0], ends[x * y < 0], arrowprops=bow)
    count = len(kernels)
    for k, kernel in enumerate(kernels):
        inset = axis.inset_axes((0.29 + 0.42 * k / count, 0.44, 0.38 / count, 0.12))
        bare_image(inset, kernel, cmap="gray")
        if k == lowest:
            inset.add_patch(Rectangle((-0.5, -0.5), 3, 3, fill=False, ec=REMOVED, lw=3))
    return figure


def filters_left(steps: Sequence[Step], number: int) -> Figure:
    """The network after ``number`` removals: its filters, and its accuracy on the way there."""
    figure, ((above,), (below,)) = subplots(2, 1, 7.5, 4.6, height_ratios=(2, 3))
    when = {(n, k): at for at, s in enumerate(steps, 1) for n, ks in s.removed.items() for k in ks}
    first = steps[0]
    widths = {name: len(first.kept[name]) + len(first.gone[name]) for name in first.kept}
    for row, (name, width) in enumerate(widths.items()):
        for k in range(width):
            gone = when.get((name, k), math.inf) <= number
            color = STAYS if gone else LAYERS[row]
            above.add_patch(Rectangle((k, -row), 0.88, 0.8, fc="none" if gone else color, ec=color))
            words = {"ha": "center", "va": "center", "size": 8, "color": INK if gone else "white"}
            above.text(k + 0.44, 0.4 - row, _ordinal(when[name, k]) if gone else k, **words)
    above.set(xlim=(-0.2, max(widths.values())), ylim=(1 - len(widths) - 0.2, 1))
    above.set_yticks([0.4 - row for row in range(len(widths))], ["first layer", "second layer"])
    above.set(xticks=[])
    above.spines[:].set_visible(False)
    above.set_title("filled: a filter and its number; empty: in which removal it went", size=9)
    accuracy = [100 * step.val_accuracy for step in steps]
    below.plot(range(1, len(steps) + 1), accuracy, color=STAYS)
    below.plot(range(1, number + 1), accuracy[:number], **look("taylor"))
    below.set(xlabel="removals", ylabel="validation accuracy (%)", xlim=(0, len(steps) + 1))
    below.xaxis.get_major_locator().set_params(integer=True)
    left = steps[number - 1]
    headline(
        figure,
        f"{left.filters} filters, {left.parameters:,} parameters, {left.macs:,} multiply-adds: "
        f"accuracy {left.val_accuracy:.1%}",
    )
    return figure


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number // 10 != 1 else "th"
    return f"{number}{ending}"


def bands(shares: Sequence[float], found: Mapping[str, numpy.ndarray], xlabel: str) -> Figure:
    """Median and quartiles of accuracy (%), over the baselines of each method (n, shares)."""
    figure, ((axis,),) = subplots(1, 1, 7.5, 4.4)
    for method, accuracy in found.items():
        line = look(method)
        low, high = numpy.percentile(accuracy, (25, 75), axis=0)
        axis.fill_between(100 * shares, low, high, color=line["color"], alpha=0.2, lw=0)
        axis.plot(100 * shares, numpy.median(accuracy, 0), label=method, markevery=3, **line)
    axis.set(xlabel=xlabel, ylabel="validation accuracy after a removal (%)")
    axis.set(xlim=(100, 100 * min(shares)), ylim=(50, 92))
    return figure


def by_updates(table: pd.DataFrame) -> Figure:
    """Accuracy (%), mean over the way down, against the updates between two removals."""
    figure, ((axis,),) = subplots(1, 1, 7.5, 3.6)
    way = 100 * table.groupby(["method", "updates", "seed"]).val_accuracy.mean()
    places = {count: x for x, count in enumerate(sorted(table.updates.unique()))}
    for offset, method in enumerate(sorted(table.method.unique(), reverse=True)):
        found = way[method].groupby("updates").agg(["mean", "min", "max"])
        x = [places[count] + 0.08 * offset for count in found.index]
        axis.vlines(x, found["min"], found["max"], color=look(method)["color"], lw=1.5)
        axis.plot(x, found["mean"], label=method, **look(method))
    axis.set_xticks(range(len(places)), places)
    axis.set(xlabel="updates between removals", ylabel="accuracy, mean over the way (%)")
    headline(figure, "The first ten updates between removals bring most of the gain")
    label_ends(axis)
    return figure


def dumbbells(table: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Validation accuracy (%) before and after the last training: a panel a size, a row a method.

    ``table`` has the columns ``share``, ``method``, ``val_before`` and ``val_accuracy``; points are
    means over its rows.
    """
    shares = sorted(table.share.unique(), reverse=True)
    figure, axes = subplots(len(shares), 1, 7.5, 2.4 * len(shares), sharex=True)
    for axis, share in zip(axes[:, 0], shares, strict=True):
        means = (
            100
            * table[table.share == share].groupby("method")[["val_before", "val_accuracy"]].mean()
        )
        for y, method in enumerate(methods):
            before, after = means.loc[method]
            color = look(method)["color"]
            axis.plot([before, after], [y, y], color=color, lw=1.5)
            axis.plot(before, y, "o", color=color, mfc="white")
            axis.plot(after, y, "o", color=color)
        axis.set_yticks(range(len(methods)), [NAMES.get(method, method) for method in methods])
        axis.invert_yaxis()
        axis.set_title(f"at most {share:.0%} of the multiply-adds", size=10)
    axes[-1, 0].set_xlabel("validation accuracy (%): empty before the fine-tuning, filled after")
    return figure
