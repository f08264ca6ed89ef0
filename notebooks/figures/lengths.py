"""The picture of notebooks 5 and 7: accuracy against the length of training after a removal."""

from collections.abc import Sequence

from cnn_pruning.plots import INK, NAMES, headline, label_ends, look, subplots

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator


def accuracy_by_length(table: pd.DataFrame, methods: Sequence[str], title: str) -> Figure:
    """Mean test accuracy (%) against epochs after the removal: a panel a size, a line a method.

    ``table`` is that of ``long_runs/lengths.py``. Numbers say on how many baselines the first
    method is ahead of the second.
    """
    pruned = table[table.method.isin(methods)].assign(accuracy=100 * table.test_accuracy)
    shares = sorted(pruned.share.unique(), reverse=True)
    figure, axes = subplots(len(shares), 1, 7.5, 0.8 + 3.4 * len(shares), sharex=True)
    start = 100 * table[table.method == "baseline"].test_accuracy.mean()
    for axis, share in zip(axes[:, 0], shares, strict=True):
        rows = pruned[pruned.share == share]
        for method in methods:
            of_method = rows[rows.method == method].groupby("length").accuracy
            axis.plot(of_method.mean(), label=method, **look(method))
        first, second = (
            rows[rows.method == method].pivot(index="seed", columns="length", values="accuracy")
            for method in methods[:2]
        )
        for length in first:
            count = f"{(first[length] > second[length]).sum()} of {len(first)}"
            place = (length, second[length].mean())
            axis.annotate(count, place, (0, -7), textcoords="offset points", ha="center", va="top")
        axis.axhline(start, color=INK, lw=0.8, ls=":")
        axis.set(xscale="log", ylabel="test accuracy (%)")
        axis.margins(y=0.12)  # room for the numbers
        ahead = " ahead of ".join(NAMES.get(each, each) for each in methods[:2])
        said = f"{100 * share:g}% of the multiply-adds left. Numbers: {ahead}"
        axis.set_title(said, size=10)
    lengths = sorted(pruned.length.unique())
    axes[-1, 0].set_xlabel("epochs of training after the removal")
    axes[-1, 0].xaxis.set_major_locator(FixedLocator(lengths))
    axes[-1, 0].xaxis.set_major_formatter(FixedFormatter([f"{n:g}" for n in lengths]))
    axes[-1, 0].xaxis.set_minor_locator(FixedLocator([]))
    headline(figure, title)
    for axis in axes[:, 0]:
        axis.text(lengths[0], start, "the whole network, before", va="bottom", size=8, color=INK)
        label_ends(axis)
    return figure
