"""The picture of notebooks 5 and 7: accuracy against the length of training after a removal."""

from collections.abc import Sequence

from cnn_pruning.plots import INK, NAMES, headline, label_ends, look, subplots

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

MARKERS = {"scratch, same epochs": {"marker": "s"}}  # on a dotted line, a thin one isn't seen


def accuracy_by_length(table: pd.DataFrame, methods: Sequence[str], title: str) -> Figure:
    """Mean test accuracy (%) against epochs after the removal: a panel a size, a line a method.

    ``table`` is that of ``long_runs/lengths.py``. The row at the bottom says on how many baselines
    the first method is ahead of the second.
    """
    pruned = table[table.method.isin(methods)].assign(accuracy=100 * table.test_accuracy)
    shares = sorted(pruned.share.unique(), reverse=True)
    figure, axes = subplots(len(shares), 1, 7.5, 0.8 + 4.2 * len(shares), sharex=True)
    start = 100 * table[table.method == "baseline"].test_accuracy.mean()
    for axis, share in zip(axes[:, 0], shares, strict=True):
        rows = pruned[pruned.share == share]
        for method in methods:
            of_method = rows[rows.method == method].groupby("length").accuracy
            axis.plot(of_method.mean(), label=method, **look(method) | MARKERS.get(method, {}))
        first, second = (
            rows[rows.method == method].pivot(index="seed", columns="length", values="accuracy")
            for method in methods[:2]
        )
        for length in first:
            count = f"{(first[length] > second[length]).sum()} of {len(first)}"
            place = axis.get_xaxis_transform()
            axis.text(length, 0.02, count, transform=place, ha="center", size=9)
        axis.axhline(start, color=INK, lw=0.8, ls=":")
        axis.set(xscale="log", ylabel="test accuracy (%)")
        axis.margins(x=0.08, y=0.12)  # room for the row of numbers
        ahead = " ahead of ".join(NAMES.get(each, each) for each in methods[:2])
        said = f"{100 * share:g}% of the multiply-adds left. Bottom row: {ahead}"
        axis.set_title(said, size=10)
    lengths = sorted(pruned.length.unique())
    in_all = "(scratch: as many epochs or multiply-adds as Taylor's network had in all)"
    axes[-1, 0].set_xlabel(f"epochs of training after the removal\n{in_all}")
    axes[-1, 0].xaxis.set_major_locator(FixedLocator(lengths))
    axes[-1, 0].xaxis.set_major_formatter(FixedFormatter([f"{n:g}" for n in lengths]))
    axes[-1, 0].xaxis.set_minor_locator(FixedLocator([]))
    headline(figure, title)
    for axis in axes[:, 0]:
        axis.text(lengths[0], start, "the whole network, before", va="bottom", size=8, color=INK)
        label_ends(axis)
    return figure
