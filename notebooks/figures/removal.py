"""The figures of notebook 4: what leaves a network with a filter, and what that costs."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, REMOVED, STAYS, headline, label_ends, look, subplots

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

FOLLOWS = "#E8AD8C"  # what leaves with a removed filter


def filter_lines(
    maps: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]], title: str
) -> Figure:
    """Drawn so that what belongs to one filter lies on one line: a conv-conv-linear chain.

    ``maps`` are the feature maps (K, H, W) of both convolutions on one image, and ``removed`` the
    filters of each that go. A filter of the first layer stands above its map, and that above the
    slices that read it; each row of slices is a filter of the second, with its map and the weights
    of the linear layer that read it on its right.
    """
    (above, below), (gone_above, gone_below) = maps.values(), removed.values()
    width, height, classes, top = len(above), len(below), 10, 4.2
    figure, ((axis,),) = subplots(1, 1, 7.6, 6)
    axis.set(xlim=(-5.8, width + classes + 3.6), ylim=(top + height + 0.2, -1.2), aspect="equal")
    axis.axis("off")

    def cell(x: float, y: float, color: str) -> None:
        axis.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, color=color, lw=0))

    def feature_map(x: float, y: float, values: Tensor, gone: bool) -> None:
        axis.imshow(values, cmap="magma", extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04))
        for ys in ((y, y + 1), (y + 1, y)) if gone else ():
            axis.plot((x, x + 1), ys, color=REMOVED, lw=2)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        look = {"arrowstyle": "-|>", "color": color, "lw": 1, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", end, start, arrowprops=look)

    for i in range(width):
        gone = i in gone_above
        cell(i, 0, REMOVED if gone else STAYS)
        feature_map(i, 1.9, above[i], gone)
        arrow((i + 0.5, 1.05), (i + 0.5, 1.85), REMOVED if gone else STAYS)
        arrow((i + 0.5, 3.0), (i + 0.5, 4.1), FOLLOWS if gone else STAYS)
        for n in range(height):
            cell(i, top + n, REMOVED if n in gone_below else FOLLOWS if gone else STAYS)
    for n in range(height):
        y, gone = top + n, n in gone_below
        feature_map(width + 1.2, y, below[n], gone)
        arrow((width + 0.1, y + 0.5), (width + 1.1, y + 0.5), REMOVED if gone else STAYS)
        arrow((width + 2.3, y + 0.5), (width + 3.3, y + 0.5), FOLLOWS if gone else STAYS)
        for c in range(classes):
            cell(width + 3.4 + c, y, FOLLOWS if gone else STAYS)
    beside = {"ha": "right", "va": "center", "size": 9}
    axis.text(-0.4, 0.5, "first layer:\nits filters", **beside)
    axis.text(-0.4, 2.4, "their maps", **beside)
    words = "second layer:\na row is a filter,\na cell is its slice\nfor the map above"
    axis.text(-1.5, top + height / 2, words, linespacing=1.4, **beside)
    for i in gone_above:
        axis.text(i + 0.5, -0.3, i, color=REMOVED, ha="center", size=9, weight="bold")
    for n in gone_below:
        axis.text(-0.3, top + n + 0.5, n, color=REMOVED, weight="bold", **beside)
    axis.text(width + 1.7, top - 0.4, "its map", ha="center", size=9)
    each = below[0].numel()
    words = "linear layer, drawn turned (columns\nin PyTorch): a row reads one map,\n"
    words += f"a cell is its {each} weights for one class"
    axis.text(width + 3.4, top - 0.4, words, size=9)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (REMOVED, FOLLOWS, STAYS)]
    names = ("the filter and its map", "what the next layer has for it", "stays")
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    headline(figure, title)
    return figure


def accuracy_by_removed(
    counts: Sequence[int], methods: Mapping[str, Tensor], title: str, mark: int
) -> Figure:
    """Accuracy (%) against the number of removed filters, for methods that ``look`` knows.

    Each is (draws, counts); several draws are drawn as their mean, with a band from lowest to
    highest. ``mark`` draws a vertical line at that number of filters.
    """
    figure, ((axis,),) = subplots(1, 1, 7, 4.2)
    for name, accuracy in methods.items():
        axis.plot(counts, 100 * accuracy.mean(0), label=name, **look(name))
        if len(accuracy) > 1:
            low, high = (100 * accuracy.aminmax(dim=0)[i] for i in (0, 1))
            axis.fill_between(counts, low, high, color=look(name)["color"], alpha=0.2, lw=0)
    axis.axvline(mark, color=INK, lw=1, ls="--")
    axis.text(mark, 2, f" {mark} filters")
    axis.axhline(10, color=INK, lw=0.5, ls=":")
    axis.text(0, 11, "guessing", size=9)
    axis.set(xlabel="filters removed, without fine-tuning", xticks=range(0, counts[-1] + 1, 2))
    axis.set(ylabel="validation accuracy (%)", ylim=(0, 100))
    headline(figure, title)
    label_ends(axis)
    return figure
