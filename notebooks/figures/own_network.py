"""The figures of notebook 9: a network on its way down, and its stages and groups."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, LAYERS, METHODS, headline, subplots

import pandas as pd
from matplotlib.figure import Figure


def way_down(
    way: pd.DataFrame,
    ends: pd.DataFrame,
    names: Mapping[str, str],
    rows: Mapping[str, str],
    title: str,
) -> Figure:
    """Accuracy (%) while a network shrinks, and below it that of each network at the end.

    ``way`` has the columns ``method``, ``share`` and ``val_accuracy``: a line is the mean by share
    of the MACs, and the band goes from the lowest to the highest. ``ends`` has ``method`` and
    ``test_accuracy``: a dot each, and a stroke at the mean. ``names`` and ``rows`` say which
    methods to draw, in which order, and what to call them.
    """
    figure, ((above,), (below,)) = subplots(2, 1, 7, 6, height_ratios=(3, 2.4))
    for method, label in names.items():
        by_share = way[way.method == method].groupby("share").val_accuracy
        found, color = 100 * by_share.agg(["mean", "min", "max"]), METHODS[method]
        left = 100 * found.index
        above.plot(left, found["mean"], "o-", color=color, label=label)
        above.fill_between(left, found["min"], found["max"], color=color, alpha=0.2, lw=0)
    above.set(xlabel="MACs left (%), at most", ylabel="validation accuracy (%)")
    above.set_title("On the way down: mean and range over the seeds")
    above.invert_xaxis()
    above.legend(loc="lower left")
    for y, method in enumerate(rows):
        values = 100 * ends[ends.method == method].test_accuracy
        color = METHODS[method.split(",")[0]]
        below.plot(values, [y] * len(values), "o", color=color, alpha=0.6)
        below.plot(values.mean(), y, "|", color=color, ms=18, mew=3)
    below.set_yticks(range(len(rows)), rows.values())
    below.set(xlabel="test accuracy (%)", title="After fine-tuning: each seed, and the mean")
    below.invert_yaxis()
    headline(figure, title)
    return figure


def stage_bars(
    found: Mapping[str, Sequence[tuple[str, float, float]]], title: str, images: int
) -> Figure:
    """Millions of MACs, and milliseconds for ``images``, of each stage of up to three networks.

    Each network is a list of (stage, millions of MACs, ms), the same stages in the same order.
    """
    figure, (axes,) = subplots(1, 2, 7, 5.6, sharey=True)
    looks = (
        {"color": METHODS["baseline"]},
        {"color": METHODS["taylor"]},
        {"fc": "none", "ec": METHODS["taylor"]},
    )
    for at, ((name, rows), look) in enumerate(zip(found.items(), looks, strict=False)):
        places = [y + 0.27 * (at - 1) for y in range(len(rows))]
        axes[0].barh(places, [macs for _, macs, _ in rows], 0.24, label=name, **look)
        axes[1].barh(places, [ms for *_, ms in rows], 0.24, **look)
    axes[0].set_yticks(range(len(rows)), [stage for stage, *_ in rows])
    axes[0].set(xlabel="multiply-adds an image (million)")
    axes[1].set(xlabel=f"ms for {images} images")
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower right")
    headline(figure, title)
    return figure


def skip_connection() -> Figure:
    """A residual block: which convolutions' filters are added together, and which stand alone."""
    figure, ((axis,),) = subplots(1, 1, 7, 2.7)
    one, other = LAYERS[:2]
    boxes = {
        "conv": (0, one),
        "conv1": (2.2, other),
        "conv2": (4, one),
        "+": (5.6, INK),
        "next layer": (7.3, INK),
    }
    for name, (x, color) in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "fc": color, "ec": "none"}
        words = {"ha": "center", "va": "center", "size": 12, "weight": "bold"}
        axis.text(x, 0, name, color="white", bbox=look, **words)
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    for start, end in ((0.55, 1.6), (2.8, 3.4), (4.6, 5.3), (5.9, 6.4)):
        axis.annotate("", (end, 0), (start, 0), arrowprops=arrow)
    axis.plot((1.05, 1.05, 5.6, 5.6), (0, 1, 1, 0.7), color=INK, lw=1.5)
    axis.annotate("", (5.6, 0.4), (5.6, 0.9), arrowprops=arrow)
    axis.text(3.3, 1.1, "skip connection", ha="center", va="bottom", size=11)
    notes = {"conv and conv2 form one group: a filter leaves both": one}
    notes |= {"conv1 is a group of its own": other}
    for y, (note, color) in zip((-0.95, -1.5), notes.items(), strict=True):
        axis.plot(-0.4, y, "s", color=color, ms=10)
        axis.text(-0.1, y, note, size=11, va="center")
    axis.set(xlim=(-0.8, 8.2), ylim=(-1.8, 1.6))
    axis.axis("off")
    headline(figure, "Filters whose maps are added leave together")
    return figure


def before_and_after(
    sizes: Mapping[str, pd.DataFrame], colors: Mapping[str, str], title: str
) -> Figure:
    """Accuracy (%) of each method before and after a fine-tuning: a row of panels a size.

    Each table of ``sizes`` has the columns ``method``, ``val_before`` and ``val_accuracy``. A dot
    is the mean over its rows, and the bar goes from the lowest to the highest.
    """
    figure, axes = subplots(len(sizes), 2, 7, 6.4, sharex=True, sharey=True)
    for row, (size, table) in zip(axes, sizes.items(), strict=True):
        for axis, column in zip(row, ("val_before", "val_accuracy"), strict=True):
            found = 100 * table.groupby("method")[column].agg(["mean", "min", "max"])
            axis.grid(axis="y", lw=0.3)
            axis.set_axisbelow(True)
            for y, (method, color) in enumerate(colors.items()):
                mean, low, high = found.loc[method]
                axis.plot([low, high], [y, y], color=color, lw=2)
                axis.plot(mean, y, "o", color=color)
        row[0].set_title(size)
        row[0].set_yticks(range(len(colors)), colors)
    axes[0, 0].invert_yaxis()
    axes[-1, 0].set_xlabel("before fine-tuning (%)")
    axes[-1, 1].set_xlabel("after fine-tuning (%)")
    figure.supxlabel("validation accuracy: mean, lowest to highest", size=10)
    headline(figure, title)
    return figure
