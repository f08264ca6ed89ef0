"""The figures of notebook 9: batch norm, a network on its way down, its stages, its groups."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import (
    INK,
    LAYERS,
    METHODS,
    NAMES,
    PAGE,
    headline,
    label_ends,
    look,
    subplots,
)

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor


def strip(pictures: Mapping[str, Tensor]) -> Figure:
    """An image (H, W), and maps (H, W) on one scale, side by side."""
    figure, (axes,) = subplots(1, len(pictures), 7, 2.4)
    brightest = max(values.max() for values in [*pictures.values()][1:])
    for axis, (name, values) in zip(axes, pictures.items(), strict=True):
        first = axis is axes[0]
        colors = {"cmap": "gray_r"} if first else {"cmap": "magma", "vmax": brightest}
        axis.imshow(values, vmin=0, **colors)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, size=10)
        axis.spines[:].set_visible(True)
    headline(figure, "Behind a batch norm, a filter of zeros is not a removed filter")
    return figure


def way_down(way: pd.DataFrame, methods: Sequence[str], gaps: pd.DataFrame, title: str) -> Figure:
    """Accuracy (%) while a network shrinks, and below it what the end is worth beside others.

    ``way`` has the columns ``method``, ``share`` and ``val_accuracy``: a line is the mean by share
    of the MACs. ``gaps`` has, for each network that Taylor's is compared with, the difference of
    each seed (points), its ``mean`` and ``half`` of its interval.
    """
    figure, ((above,), (below,)) = subplots(2, 1, 7, 6.4, height_ratios=(3, 2.6))
    for method in methods:
        mean = 100 * way[way.method == method].groupby("share").val_accuracy.mean()
        above.plot(100 * mean.index, mean, label=method, **look(method))
    above.set(xlabel="multiply-adds left (%), at most", ylabel="validation accuracy (%)")
    above.set_title("On the way down: mean over the seeds")
    above.set_xlim(78, 1)
    for y, (_, row) in enumerate(gaps.iterrows()):
        each = row.drop(["mean", "half"])
        below.plot(each, [y + 0.22] * len(each), "|", color=METHODS["taylor"], ms=8)
        below.errorbar(row["mean"], y, xerr=row["half"], fmt="o", color=INK, capsize=4)
    below.axvline(0, color=INK, lw=1, ls=":")
    below.set_yticks(range(len(gaps)), gaps.index)
    below.set_ylim(len(gaps) - 0.5, -0.5)
    below.set_xlabel("points of test accuracy (strokes: seeds; dot and bar: mean, 95% interval)")
    below.set_title("After fine-tuning: Taylor's network minus …")
    headline(figure, title)
    label_ends(above)
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
    for at, ((name, rows), bars) in enumerate(zip(found.items(), looks, strict=False)):
        places = [y + 0.27 * (at - 1) for y in range(len(rows))]
        axes[0].barh(places, [macs for _, macs, _ in rows], 0.24, label=name, **bars)
        axes[1].barh(places, [ms for *_, ms in rows], 0.24, **bars)
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
        box = {"boxstyle": "round,pad=0.5", "fc": color, "ec": "none"}
        words = {"ha": "center", "va": "center", "size": 12, "weight": "bold"}
        axis.text(x, 0, name, color="white", bbox=box, **words)
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


STAGES = {  # what was measured, and how its dot is filled
    "val_before": {"mfc": PAGE},
    "val_refreshed": {"fillstyle": "left", "markerfacecoloralt": PAGE},
    "val_accuracy": {},
}

METHOD_LOOKS = {  # of the residual network's methods: what ``plots.look`` draws them like
    "taylor": "taylor",
    "sum of absolute scores": "taylor_abs_first",
    "weight": "weight",
    "Torch-Pruning's Taylor": "obd",
    "Torch-Pruning's magnitude": "apoz",
    "random, same layers": "random, same layers",
    "random": "random",
}


def stage_dots(sizes: Mapping[float, pd.DataFrame], title: str) -> Figure:
    """Accuracy (%) of each method at three stages: a row a method, the best at the end on top.

    ``sizes`` maps a share of the MACs, a panel each, to a table with the columns ``method`` and
    those of ``STAGES``; a dot is the mean over its rows.
    """
    figure, axes = subplots(len(sizes), 1, 7, 2.6 * len(sizes), sharex=True)
    for (axis,), (share, table) in zip(axes, sizes.items(), strict=True):
        means = 100 * table.groupby("method")[[*STAGES]].mean().sort_values("val_accuracy")
        for y, (method, row) in enumerate(means.iterrows()):
            dot = {"color": look(METHOD_LOOKS[method])["color"], "marker": "o", "ms": 9}
            axis.plot((row.min(), row.max()), (y, y), color=dot["color"], lw=1, zorder=1)
            for stage, fill in STAGES.items():
                axis.plot(row[stage], y, **dot | fill)
        axis.set_yticks(range(len(means)), [NAMES.get(name, name) for name in means.index])
        axis.set(title=f"{share:.0%} of the multiply-adds", xlim=(0, 100))
    axis.set_xlabel("validation accuracy (%): ○ removed  ◐ statistics taken anew  ● after an epoch")
    headline(figure, title)
    return figure
