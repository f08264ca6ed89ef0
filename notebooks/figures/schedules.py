"""The figures of notebook 7: the paper's loop, and what fine-tuning does to its gaps."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, LAYERS, METHODS, REMOVED, subplots

import pandas as pd
from matplotlib.figure import Figure


def loop_diagram() -> Figure:
    """The paper's loop: train a little, score in the same passes, remove, repeat."""
    figure, ((axis,),) = subplots(1, 1, 10, 2.4)
    boxes = {
        "a trained\nnetwork": (0, INK),
        "train a little": (2.2, LAYERS[0]),
        "score each filter,\nin the same passes": (4.6, METHODS["taylor"]),
        "remove\nthe lowest": (7, REMOVED),
        "fine-tune": (9.2, LAYERS[0]),
    }
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    for words, (x, color) in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "fc": "none", "ec": color, "lw": 2}
        axis.text(x, 0, words, ha="center", va="center", color=color, size=11, bbox=look)
    for start, end in ((0.75, 1.35), (3.05, 3.5), (5.7, 6.3), (7.7, 8.5)):
        axis.annotate("", (end, 0), (start, 0), arrowprops=arrow)
    back = arrow | {"connectionstyle": "bar,fraction=-0.16"}
    axis.annotate("", (2.2, -0.42), (7, -0.42), arrowprops=back)
    axis.text(4.6, -1.15, "still too large", ha="center", va="top")
    axis.text(8.1, 0.12, "small\nenough", ha="center", va="bottom", size=9)
    axis.set(xlim=(-0.8, 9.9), ylim=(-1.6, 0.7))
    axis.axis("off")
    return figure


def dots_by_size(
    sizes: Mapping[str, pd.DataFrame],
    methods: Sequence[str],
    colors: Mapping[str, str],
    hollow: Sequence[str],
) -> Figure:
    """Accuracy (%) before and after a fine-tuning: a panel a size, a row a method.

    Each table of ``sizes`` has the columns ``method``, ``val_before`` and ``val_accuracy``. A dot
    is the mean over its rows, and the bar goes from the lowest to the highest. The dots of
    ``hollow`` methods, which share their color with another, are empty.
    """
    figure, axes = subplots(2, len(sizes), 12, 6.2, sharex="row", sharey=True)
    for row, column in zip(axes, ("val_before", "val_accuracy"), strict=True):
        for axis, (title, table) in zip(row, sizes.items(), strict=True):
            found = 100 * table.groupby("method")[column].agg(["mean", "min", "max"])
            axis.set_yticks(range(len(methods)), methods)
            axis.grid(axis="y", lw=0.3)
            for y, name in enumerate(methods):
                mean, low, high = found.loc[name]
                axis.plot([low, high], [y, y], color=colors[name], lw=1.5)
                fill = "none" if name in hollow else colors[name]
                axis.plot(mean, y, "o", color=colors[name], mfc=fill, mew=1.5)
            if column == "val_before":
                axis.set_title(title)
    axes[0, 0].invert_yaxis()
    for axis, when in zip(axes[:, len(sizes) // 2], ("before", "after"), strict=True):
        axis.set_xlabel(f"validation accuracy {when} the fine-tuning (%): mean, lowest to highest")
    return figure
