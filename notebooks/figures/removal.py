"""The figures of notebook 4: what leaves a network with a filter, and what that costs."""

import itertools
from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, METHODS, REMOVED, STAYS, headline, subplots

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

FOLLOWS = "#E8AD8C"  # what leaves with a removed filter


def filter_lines(maps: Mapping[str, Tensor], removed: Mapping[str, int]) -> Figure:
    """Drawn so that what belongs to one filter lies on one line: a conv-conv-linear chain.

    ``maps`` are the feature maps (K, H, W) of both convolutions on one image, and ``removed`` is
    one filter of each. A filter of the first convolution stands above its map, and that above the
    slices that read it; each row of slices is a filter of the second, with its map and the weights
    of the linear layer that read it on its right.
    """
    (above, below), (k, j) = maps.values(), removed.values()
    width, height, classes, top = len(above), len(below), 10, 4.2
    figure, ((axis,),) = subplots(1, 1, 10, 6.6)
    axis.set(xlim=(-6.2, width + classes + 4.2), ylim=(top + height + 0.2, -1.8), aspect="equal")
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
        cell(i, 0, REMOVED if i == k else STAYS)
        feature_map(i, 1.9, above[i], i == k)
        arrow((i + 0.5, 1.05), (i + 0.5, 1.85), REMOVED if i == k else STAYS)
        arrow((i + 0.5, 3.0), (i + 0.5, 4.1), FOLLOWS if i == k else STAYS)
        for n in range(height):
            cell(i, top + n, REMOVED if n == j else FOLLOWS if i == k else STAYS)
    for n in range(height):
        y = top + n
        feature_map(width + 1.2, y, below[n], n == j)
        arrow((width + 0.1, y + 0.5), (width + 1.1, y + 0.5), REMOVED if n == j else STAYS)
        arrow((width + 2.3, y + 0.5), (width + 3.3, y + 0.5), FOLLOWS if n == j else STAYS)
        for c in range(classes):
            cell(width + 3.4 + c, y, FOLLOWS if n == j else STAYS)
    beside = {"ha": "right", "va": "center", "size": 10}
    axis.text(-0.4, 0.5, "convolution 1: its filters", **beside)
    axis.text(-0.4, 2.4, "its feature maps", **beside)
    words = "convolution 2:\na row is a filter,\na cell is its slice\nfor the map above"
    axis.text(-0.4, top + height / 2, words, linespacing=1.5, **beside)
    axis.text(k + 0.5, -0.4, f"filter {k}", color=REMOVED, ha="center", weight="bold")
    axis.text(-0.4, top + j + 0.5, f"filter {j}", color=REMOVED, weight="bold", **beside)
    axis.text(width + 1.7, top - 0.4, "its maps", ha="center", size=10)
    each = below[0].numel()
    words = f"linear layer: a row reads one map,\na cell is its {each} weights for one class"
    axis.text(width + 3.4, top - 0.4, words, size=10)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (REMOVED, FOLLOWS, STAYS)]
    names = ("the filter and its map", "what the next layer has for it", "stays")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    headline(figure, "What belongs to one filter lies on one line")
    return figure


def what_leaves(model: nn.Sequential, removed: Mapping[str, Sequence[int]]) -> Figure:
    """Every weight and bias of a conv-conv-linear chain as one cell; those that leave are colored.

    A convolution's row is a filter and its column an input channel; for the linear layer, which is
    drawn by blocks, a row is a class and a column the block of inputs that one filter feeds.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    figure, (axes,) = subplots(1, len(layers), 11, 4.2, gridspec_kw={"width_ratios": [1, 2, 3]})
    before: tuple[int, list[int]] = (1, [])
    for axis, (name, layer) in zip(axes, layers, strict=True):
        rows, gone = layer.weight.shape[0], sorted(removed.get(name, []))
        columns, gone_before = before
        places = [*range(columns), columns + 0.5]  # the bias stands apart from the weights
        for i, (j, x) in itertools.product(range(rows), enumerate(places)):
            color = REMOVED if i in gone else FOLLOWS if j in gone_before else STAYS
            axis.add_patch(Rectangle((x - 0.45, i - 0.45), 0.9, 0.9, color=color, lw=0))
        each = layer.weight.numel() // (rows * columns)
        stay = (rows - len(gone)) * ((columns - len(gone_before)) * each + 1)
        total = layer.weight.numel() + rows
        linear = isinstance(layer, nn.Linear)
        axis.set(
            xlim=(-0.7, columns + 1.2),
            ylim=(rows - 0.3, -0.7),
            yticks=range(rows),
            xlabel=f"{'block of' if linear else 'input channel,'} {each} weights each",
            ylabel="class" if linear else "filter",
        )
        kind = "linear" if linear else "convolution"
        axis.set_title(f"{name} ({kind})\n{total:,} → {stay:,} parameters", size=11)
        axis.set_xticks(places, [*range(columns), "bias"])
        axis.tick_params(labelsize=7, length=0)
        before = (rows, gone)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (REMOVED, FOLLOWS, STAYS)]
    names = ("removed filter", "what the next layer had for it", "stays")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    headline(
        figure, "A filter takes along its weights, its bias, and what the next layer had for it"
    )
    return figure


def accuracy_by_removed(
    counts: Sequence[int], methods: Mapping[str, Tensor], title: str, mark: int
) -> Figure:
    """Accuracy (%) against the number of removed filters, for methods named as in ``METHODS``.

    Each is (draws, counts); several draws are drawn as their mean, with a band from lowest to
    highest. ``mark`` draws a vertical line at that number of filters.
    """
    figure, ((axis,),) = subplots(1, 1, 9, 4)
    for name, accuracy in methods.items():
        color, several = METHODS[name], len(accuracy) > 1
        label = f"{name} (mean and range)" if several else name
        axis.plot(counts, 100 * accuracy.mean(0), marker="o", ms=4, color=color, label=label)
        if several:
            low, high = (100 * accuracy.aminmax(dim=0)[i] for i in (0, 1))
            axis.fill_between(counts, low, high, color=color, alpha=0.2, lw=0)
    axis.axvline(mark, color=INK, lw=1, ls="--")
    axis.text(mark, 2, f" {mark} filters")
    axis.axhline(10, color=INK, lw=0.5, ls=":")
    axis.text(0, 11, "guessing", size=8)
    axis.set(xlabel="filters removed, no fine-tuning", xticks=counts[:: 1 + len(counts) // 20])
    axis.set(ylabel="validation accuracy (%)", ylim=(0, 100), title=title)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    return figure
