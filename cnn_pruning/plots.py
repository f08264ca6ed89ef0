"""The figures that several notebooks share, or that are too long for one: data in, figure out."""

import base64
import io
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw
from torch import Tensor, nn

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import VBox

# One color for a thing, in every figure, on a light page and on a dark one. The layers and the
# removed filters have Okabe and Ito's; the methods keep their distance from the first two layers,
# from removed filters, and from each other, for color-blind readers too.
INK = "#7B7B7B"  # words, axes and lines that stand for no method
LAYERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
REMOVED = "#D55E00"
FOLLOWS = "#E8AD8C"  # what leaves with a removed filter
STAYS = "#B8B8B8"
CONTROL = "#A0A0A0"
METHODS = {
    "taylor": "#009068",
    "taylor_abs_first": "#6CC9AE",
    "oracle": "#A84C7E",
    "oracle_abs": "#A84C7E",
    "greedy": "#8450DA",
    "weight": "#62B8F0",
    "activation_mean": "#A9B04A",
    "apoz": "#9E5B18",
    "obd": "#5F58C8",
    "random": CONTROL,
    "random, like taylor": CONTROL,
    "baseline": "#666666",
    "fine-tuned": "#009068",  # what Taylor left
    "one shot": "#009068",
    "scratch": "#8B80F9",
}
NEARLY_DEAD = 100  # times less than the highest score
STYLE = {
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.use_mathtext": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "hatch.color": REMOVED,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use_style() -> None:
    """Draw all figures alike; in a notebook, with two pixels where the page has one."""
    plt.rcParams.update(STYLE)
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not shell:
        return
    from matplotlib_inline import backend_inline

    backend_inline.set_matplotlib_formats("retina")
    # It would ask for a white page behind every transparent figure; ours can do without.
    backend_inline._fetch_figure_metadata = lambda figure: None
    pngs = shell.display_formatter.formatters["image/png"]
    sharp = pngs.lookup_by_type(Figure)

    def small(figure: Figure) -> tuple[bytes, dict] | None:
        found = sharp(figure)  # in base64, and the size on the page; nothing for an empty figure
        return found and (_in_256_colors(base64.b64decode(found[0])), found[1])

    pngs.for_type(Figure, small)


def headline(figure: Figure, text: str) -> None:
    """Say above the whole figure, in bold, what there is to see."""
    figure.suptitle(text, x=0.01, ha="left", weight="bold")


def png(figure: Figure) -> bytes:
    """The figure as a PNG, for an ``ipywidgets.Image``, with two pixels where the page has one.

    Give the widget the figure's width on the page: inches times ``STYLE["figure.dpi"]``.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * figure.dpi)
    plt.close(figure)
    return _in_256_colors(file.getvalue())


def _in_256_colors(picture: bytes) -> bytes:
    """The same PNG in less than half of the bytes: a notebook has a megabyte for its figures."""
    file = io.BytesIO()
    colors = Image.open(io.BytesIO(picture)).convert("RGBA")
    few = colors.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


def _figure(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, **options
        )
    plt.close(figure)  # the notebook shows what it is given, once
    return figure, axes


def _picture(axis: Axes, values: Tensor, **options) -> None:
    axis.imshow(values, interpolation="nearest", **options)  # sharp, and a smaller file
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def curves(histories: Mapping[str, Sequence[Mapping]], title: str) -> Figure:
    """Loss and accuracy by epoch; ``histories`` maps a name to the rows of ``fit``.

    A name in ``METHODS`` has the color from there, any other that of the baseline. A row's
    ``epoch`` is where it is drawn, so that a later training can start where another ended; a row
    without ``train_loss`` is a network as it was before that training.
    """
    figure, (axes,) = _figure(1, 2, 10, 3.6)
    for name, rows in histories.items():
        color = METHODS.get(name, METHODS["baseline"])
        for axis, key, style in (
            (axes[0], "train_loss", "--"),
            (axes[0], "val_loss", "-"),
            (axes[1], "val_accuracy", "-"),
        ):
            scale = 100 if key == "val_accuracy" else 1
            values = [scale * row.get(key, math.nan) for row in rows]
            epochs = [row["epoch"] for row in rows]
            label = f"{name}, {'training' if style == '--' else 'validation'}"
            axis.plot(epochs, values, style, color=color, marker="o", ms=4, label=label)
    axes[0].set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy on validation images")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        if histories:
            axis.legend(fontsize=8, handlelength=3.5)
    headline(figure, title)
    return figure


def score_bars(
    scores: Mapping[str, Tensor],
    ylabel: str,
    title: str,
    removed: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """One bar a filter, layer beside layer on one scale; ``removed`` filters are hatched."""
    widths = [len(values) for values in scores.values()]
    figure, (axes,) = _figure(
        1, len(scores), 10, 3.2, sharey=True, gridspec_kw={"width_ratios": widths}
    )
    for i, (axis, (layer, values)) in enumerate(zip(axes, scores.items(), strict=True)):
        bars = axis.bar(range(len(values)), values.tolist(), color=LAYERS[i % len(LAYERS)])
        for k in (removed or {}).get(layer, []):
            bars[k].set(facecolor="none", edgecolor=REMOVED, hatch="////")
        axis.set(xlabel=f"filter of convolution {i + 1} ({layer})", xticks=range(len(values)))
    axes[0].set_ylabel(ylabel)
    headline(figure, title)
    return figure


def filter_cards(
    layer: str,
    images: Tensor,
    maps: Tensor,
    scores: Tensor,
    color: str,
    kernels: Tensor | None = None,
) -> Figure:
    """One row a filter, best score first: its kernel, its feature maps on images, its score.

    ``images`` (N, 1, H, W), ``maps`` (K, N, H, W), ``scores`` (K,), and ``kernels`` (K, 3, 3) if
    each filter has one slice. The brightness of a map is the square root of its values.
    """
    order = scores.argsort(descending=True).tolist()
    figure, axes = _figure(
        len(order) + 1,
        len(images) + 2,
        10,
        0.66 * (len(order) + 1) + 0.4,
        gridspec_kw={"width_ratios": [1 if kernels is not None else 0.4, *[1] * len(images), 2.5]},
    )
    for axis, image in zip(axes[0, 1:], images, strict=False):
        _picture(axis, image[0], cmap="gray")
    for axis in (axes[0, 0], axes[0, -1]):
        axis.axis("off")
    axes[0, 0].set_title("filter" if kernels is None else "kernel", size=10, loc="center", y=0)
    axes[0, -1].set_title("score", size=10, y=0)
    brightness = PowerNorm(0.5, vmin=0, vmax=maps.max().item())  # dim maps have shapes too
    for row, k in zip(axes[1:], order, strict=True):
        if kernels is None:
            row[0].axis("off")
            row[0].text(0.5, 0.5, k, ha="center", va="center", size=10)
        else:
            _picture(row[0], _signed(kernels[k], kernels.abs().max().item()))
            row[0].spines[:].set_visible(True)
            row[0].set_ylabel(f"{k}  ", rotation=0, ha="right", va="center", size=10)
        for axis, values in zip(row[1:], maps[k], strict=False):
            _picture(axis, values, cmap="magma", norm=brightness)
        row[-1].barh([0], [scores[k]], color=color)
        row[-1].set(xlim=(0, 1.5 * scores.max()), ylim=(-0.8, 0.8), xticks=[], yticks=[])
        row[-1].text(scores[k] + 0.03 * scores.max(), 0, f"{scores[k]:.1e}", va="center", size=9)
        row[-1].spines["bottom"].set_visible(False)
    headline(figure, f"What the filters of {layer} see, highest score first")
    return figure


def estimate_against_truth(
    estimate: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    """One numbered point a filter, colored by layer, on logarithmic axes.

    Filters that are dead or nearly so, with less than ``1 / NEARLY_DEAD`` of the highest score,
    would stretch these, and a zero can't be drawn on them: the legend names them instead.
    """
    figure, ((axis,),) = _figure(1, 1, 7.4, 5)
    lowest = max(values.max() for values in estimate.values()) / NEARLY_DEAD
    points: list[tuple[float, float, int, str]] = []
    for i, layer in enumerate(estimate):
        x, y, color = estimate[layer], truth[layer], LAYERS[i % len(LAYERS)]
        alive = (x > lowest) & (y > 0)
        hidden = ", ".join(map(str, (~alive).nonzero().flatten().tolist()))
        label = f"convolution {i + 1} ({layer})"
        label += f"; dead or nearly dead, not drawn: {hidden}" if hidden else ""
        axis.scatter(x[alive], y[alive], s=36, color=color, label=label)
        for k in alive.nonzero().flatten().tolist():
            points.append((x[k].item(), y[k].item(), k, color))
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log", yscale="log")
    unit = math.floor(math.log10(axis.get_xlim()[1]))
    axis.set_xlabel(f"{xlabel}, in units of $10^{{{unit}}}$")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 10**unit:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_minor_formatter(NullFormatter())
    _number(axis, points)
    axis.legend()
    return figure


def _number(axis: Axes, points: Sequence[tuple[float, float, int, str]]) -> None:
    """Write the number of each point (x, y, number, color) where it is farthest from the others."""
    places = [(8, 7), (-8, 7), (8, -7), (-8, -7), (0, 9), (0, -9), (10, 0), (-10, 0)]  # in points
    scale = 72 / axis.figure.dpi
    at = [tuple(scale * axis.transData.transform(point[:2])) for point in points]
    taken = list(at)
    for (x, y, number, color), here in zip(points, at, strict=True):
        others = [place for place in taken if place != here]
        choices = {place: (here[0] + place[0], here[1] + place[1]) for place in places}
        far = {p: min((math.dist(q, o) for o in others), default=0) for p, q in choices.items()}
        offset = max(far, key=far.get)
        taken.append(choices[offset])
        look = {"color": color, "size": 8, "ha": "center", "va": "center"}
        axis.annotate(number, (x, y), offset, textcoords="offset points", **look)


def accuracy_by_removed(
    counts: Sequence[int],
    methods: Mapping[str, Tensor],
    title: str,
    mark: int | None = None,
    xlabel: str = "filters removed, no fine-tuning",
) -> Figure:
    """Accuracy (%) against the number of removed filters, for methods named as in ``METHODS``.

    Each is (draws, counts); several draws are drawn as their mean, with a band from lowest to
    highest. ``mark`` draws a vertical line at that number of filters.
    """
    figure, ((axis,),) = _figure(1, 1, 9, 4)
    for name, accuracy in methods.items():
        color, several = METHODS[name], len(accuracy) > 1
        label = f"{name} (mean and range)" if several else name
        axis.plot(counts, 100 * accuracy.mean(0), marker="o", ms=4, color=color, label=label)
        if several:
            low, high = (100 * accuracy.aminmax(dim=0)[i] for i in (0, 1))
            axis.fill_between(counts, low, high, color=color, alpha=0.2, lw=0)
    if mark is not None:
        axis.axvline(mark, color=INK, lw=1, ls="--")
        axis.text(mark, 2, f" {mark} filters")
    axis.axhline(10, color=INK, lw=0.5, ls=":")
    axis.text(0, 11, "guessing", size=8)
    axis.set(
        xlabel=xlabel,
        ylabel="validation accuracy (%)",
        ylim=(0, 100),
        xticks=counts[:: 1 + len(counts) // 20],
        title=title,
    )
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    return figure


def what_leaves(model: nn.Sequential, removed: Mapping[str, Sequence[int]]) -> Figure:
    """Every weight and bias of a conv-conv-linear chain as one cell; those that leave are colored.

    A convolution's row is a filter and its column an input channel; for the linear layer, which is
    drawn by blocks, a row is a class and a column the block of inputs that one filter feeds.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    figure, (axes,) = _figure(1, len(layers), 11, 4.2, gridspec_kw={"width_ratios": [1, 2, 3]})
    before: tuple[int, list[int]] = (1, [])
    for axis, (name, layer) in zip(axes, layers, strict=True):
        rows, gone = layer.weight.shape[0], sorted(removed.get(name, []))
        columns, gone_before = before
        for i, j in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).tolist():
            as_filter, as_input = i in gone, j in gone_before
            color = REMOVED if as_filter else FOLLOWS if as_input else STAYS
            axis.add_patch(Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, color=color, lw=0))
        bias = columns + 0.5  # apart from the weights
        for i in range(rows):
            color = REMOVED if i in gone else STAYS
            axis.add_patch(Rectangle((bias - 0.45, i - 0.45), 0.9, 0.9, color=color, lw=0))
        each = layer.weight.numel() // (rows * columns)
        stay = (rows - len(gone)) * (columns - len(gone_before)) * each + rows - len(gone)
        total = layer.weight.numel() + rows
        linear = isinstance(layer, nn.Linear)
        axis.set(
            xlim=(-0.7, bias + 0.7),
            ylim=(rows - 0.3, -0.7),
            yticks=range(rows),
            xlabel=f"{'block of' if linear else 'input channel,'} {each} weights each",
            ylabel="class" if linear else "filter",
        )
        kind = "linear" if linear else "convolution"
        axis.set_title(f"{name} ({kind})\n{total:,} → {stay:,} parameters", size=11)
        axis.set_xticks([*range(columns), bias], [*range(columns), "bias"])
        axis.tick_params(labelsize=7, length=0)
        before = (rows, gone)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (REMOVED, FOLLOWS, STAYS)]
    names = ("removed filter", "what the next layer had for it", "stays")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    title = "A filter takes along its weights, its bias, and what the next layer had for it"
    headline(figure, title)
    return figure


def overview(
    image: Tensor,
    maps: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]],
    outcome: Sequence[str] = (),
) -> Figure:
    """The README's picture: every filter's feature map on ``image`` above its score.

    ``image`` (H, W); ``maps`` (K, H, W) and normalized ``scores`` (K,) for each layer, whose bars
    have one scale. The filters of each layer stand in the order of their scores; those in
    ``removed`` are crossed out. ``outcome`` are lines that stand beside the first layer, below what
    is left of the filters.
    """
    widest = max(len(values) for values in scores.values())
    figure, axes = _figure(
        2 * len(scores),
        widest + 1,
        12,
        2 * len(scores) + 0.4,
        gridspec_kw={"width_ratios": [1.9, *[1] * widest], "height_ratios": [1, 1] * len(scores)},
    )
    figure.get_layout_engine().set(h_pad=0.01, w_pad=0.02)
    highest = max(values.max().item() for values in scores.values())
    for axis in axes.flat:
        axis.axis("off")
    _picture(axes[0, 0], image, cmap="gray_r")
    for i, (layer, values) in enumerate(scores.items()):
        top, bottom = axes[2 * i], axes[2 * i + 1]
        color, filters = LAYERS[i % len(LAYERS)], len(values)
        words = {"color": color, "weight": "bold", "size": 11, "va": "top"}
        bottom[0].text(0, 1, f"Convolution {i + 1}:\n{filters} filters", **words)
        bottom[0].text(0, 0.42, "above, what each\nsees; here, its score", size=9, va="top")
        brightness = PowerNorm(0.5, vmin=0, vmax=maps[layer].max().item())
        order = values.argsort(descending=True).tolist()
        for column, k in enumerate(order, start=1):
            gone = k in removed.get(layer, [])
            _picture(top[column], maps[layer][k], cmap="magma", norm=brightness)
            look = {"fc": "none", "ec": REMOVED, "hatch": "////"} if gone else {"fc": color}
            bottom[column].bar([0], [values[k]], width=0.4, **look)
            bottom[column].set(xlim=(-0.5, 0.5), ylim=(0, highest))
            if gone:
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    top[column].plot((0, end), ys, color=REMOVED, lw=2.5)
    before, gone = (sum(map(len, each.values())) for each in (scores, removed))
    lines = "\n".join((f"{before} filters → {before - gone}", *outcome))
    beside = len(next(iter(scores.values()))) + 2
    if beside < widest:
        look = {"size": 15, "va": "top", "linespacing": 1.8}
        words = axes[0, beside].text(0, 1, lines, transform=axes[0, beside].transAxes, **look)
        words.set_in_layout(False)  # it takes the place of several columns
    headline(figure, f"Every filter gets a score; the {gone} lowest leave the network")
    return figure


def dots_by_size(
    sizes: Mapping[str, "pd.DataFrame"],
    methods: Sequence[str],
    colors: Mapping[str, str],
    hollow: Sequence[str] = (),
) -> Figure:
    """Accuracy (%) before and after a fine-tuning: a panel a size, a row a method.

    Each table of ``sizes`` has the columns ``method``, ``val_before`` and ``val_accuracy``. A dot
    is the mean over its rows, and the bar goes from the lowest to the highest. The dots of
    ``hollow`` methods, which share their color with another, are empty.
    """
    figure, axes = _figure(2, len(sizes), 12, 6.2, sharex="row", sharey=True)
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


def loop_diagram() -> Figure:
    """The paper's loop: train a little, score in the same passes, remove, repeat."""
    figure, ((axis,),) = _figure(1, 1, 10, 2.4)
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


def way_down(
    way: "pd.DataFrame",
    ends: "pd.DataFrame",
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
    figure, ((above,), (below,)) = _figure(2, 1, 7, 6, height_ratios=(3, 2.4))
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
    figure, (axes,) = _figure(1, 2, 7, 5.6, sharey=True)
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
    figure, ((axis,),) = _figure(1, 1, 7, 2.7)
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
    sizes: Mapping[str, "pd.DataFrame"], colors: Mapping[str, str], title: str
) -> Figure:
    """Accuracy (%) of each method before and after a fine-tuning: a row of panels a size.

    Each table of ``sizes`` has the columns ``method``, ``val_before`` and ``val_accuracy``. A dot
    is the mean over its rows, and the bar goes from the lowest to the highest.
    """
    figure, axes = _figure(len(sizes), 2, 7, 6.4, sharex=True, sharey=True)
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


def slices(maps: Mapping[str, Tensor], removed: Mapping[str, int], classes: int = 10) -> Figure:
    """Drawn so that what belongs to one filter lies on one line: a conv-conv-linear chain.

    ``maps`` are the feature maps (K, H, W) of both convolutions on one image, and ``removed`` is
    one filter of each. A filter of the first convolution stands above its map, and that above the
    slices that read it; each row of slices is a filter of the second, with its map and the weights
    of the linear layer that read it on its right.
    """
    (above, below), (k, j) = maps.values(), removed.values()
    width, height, top = len(above), len(below), 4.2
    figure, ((axis,),) = _figure(1, 1, 10, 6.6)
    axis.set(xlim=(-6.2, width + classes + 4.2), ylim=(top + height + 0.2, -1.8), aspect="equal")
    axis.axis("off")

    def cell(x: float, y: float, color: str) -> None:
        axis.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, color=color, lw=0))

    def feature_map(x: float, y: float, values: Tensor, gone: bool) -> None:
        axis.imshow(values, cmap="magma", extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04))
        for ys in ((y, y + 1), (y + 1, y)) if gone else ():
            axis.plot((x, x + 1), ys, color=REMOVED, lw=2)

    for i in range(width):
        cell(i, 0, REMOVED if i == k else STAYS)
        feature_map(i, 1.9, above[i], i == k)
        _arrow(axis, (i + 0.5, 1.05), (i + 0.5, 1.85), REMOVED if i == k else STAYS)
        _arrow(axis, (i + 0.5, 3.0), (i + 0.5, 4.1), FOLLOWS if i == k else STAYS)
        for n in range(height):
            cell(i, top + n, REMOVED if n == j else FOLLOWS if i == k else STAYS)
    for n in range(height):
        y = top + n
        feature_map(width + 1.2, y, below[n], n == j)
        _arrow(axis, (width + 0.1, y + 0.5), (width + 1.1, y + 0.5), REMOVED if n == j else STAYS)
        _arrow(axis, (width + 2.3, y + 0.5), (width + 3.3, y + 0.5), FOLLOWS if n == j else STAYS)
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


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    look = {"arrowstyle": "-|>", "color": color, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=look)


def sorted_changes(changes: Sequence[Mapping[str, Tensor]], titles: Sequence[str]) -> Figure:
    """For each network, the change of the loss (nats) without each filter, largest first."""
    figure, (axes,) = _figure(1, len(changes), 12, 2.6, sharey=True)
    for axis, change, title in zip(axes, changes, titles, strict=True):
        values = torch.cat(list(change.values()))
        layers = [LAYERS[i] for i, each in enumerate(change.values()) for _ in each]
        order = values.argsort(descending=True).tolist()
        axis.bar(range(len(values)), values[order].tolist(), color=[layers[k] for k in order])
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set(xlabel="filters, sorted", title=title, xticks=[])
    axes[0].set_ylabel("change of the loss (nats)")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in LAYERS[: len(changes[0])]]
    axes[-1].legend(handles, list(changes[0]))
    headline(figure, "A few filters carry the network, and most matter little")
    return figure


def correlations(
    found: Mapping[str, Mapping[str, tuple[float, float]]],
    by_chance: Mapping[str, tuple[float, float]],
    marks: Mapping[str, float],
    title: str,
) -> Figure:
    """One panel a way of comparing, one row a criterion: ρ with its interval, beside chance.

    ``found`` maps each way to criteria, and these to (mean, half the interval); ``by_chance`` has
    the ends of the gray band and ``marks`` the dotted line of a panel.
    """
    figure, (axes,) = _figure(1, len(found), 11, 4, sharey=True)
    for axis, (way, criteria) in zip(axes, found.items(), strict=True):
        axis.axvspan(*by_chance[way], color=CONTROL, alpha=0.25, lw=0)
        axis.axvline(0, color=INK, lw=0.5)
        if way in marks:
            axis.axvline(marks[way], color=INK, ls=":")
        for name, (mean, half) in criteria.items():
            color = METHODS.get(name, INK)
            axis.errorbar(mean, name, xerr=half, fmt="o", color=color, capsize=3)
        axis.set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ with oracle-abs", title=way)
    axes[0].invert_yaxis()
    headline(figure, title)
    return figure


def rho_by_factor(
    factors: Tensor, rhos: Tensor, bands: Mapping[str, tuple[Sequence[float], str]], title: str
) -> Figure:
    """ρ over all filters if the scores of one layer are multiplied by a factor, raw being 1.

    ``rhos`` is (networks, factors); ``bands`` maps a name to factors, one a network, and a color.
    """
    figure, ((axis,),) = _figure(1, 1, 8, 3.6)
    axis.plot(factors, rhos.T, color=CONTROL, alpha=0.5)
    axis.plot(factors, rhos.mean(0), color=METHODS["taylor"], lw=2.5, label="mean of the networks")
    axis.axvline(1, color=INK, lw=1, ls=":", label="raw")
    for label, (places, color) in bands.items():
        axis.axvspan(min(places), max(places), color=color, alpha=0.6, lw=0, label=label)
    axis.set(xscale="log", xlabel="factor on the first layer's scores", title=title)
    axis.set_ylabel("Spearman's ρ over all filters")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(loc="lower right")
    return figure


def cost_bars(seconds: Mapping[str, float], notes: Mapping[str, str], title: str) -> Figure:
    """One bar a criterion, the cheapest first: its seconds, and what ``notes`` says of it."""
    figure, ((axis,),) = _figure(1, 1, 9, 0.34 * len(seconds) + 1)
    names = sorted(seconds, key=seconds.get)
    axis.barh(names, [seconds[n] for n in names], color=[METHODS.get(n, INK) for n in names])
    for row, name in enumerate(names):
        axis.annotate(
            notes[name], (seconds[name], row), (5, 0), textcoords="offset points", va="center"
        )
    axis.set(xscale="log", xlabel="seconds", title=title)
    axis.set_xlim(right=8 * max(seconds.values()))  # room for the notes
    axis.xaxis.set_major_formatter("{x:g}")
    axis.invert_yaxis()
    return figure


def gate_diagram(image: Tensor) -> Figure:
    """A drawing of three filters that look at ``image`` (H, W), each with a gate behind its map.

    The second gate is closed. A dashed arrow shows where the gradient arrives.
    """
    figure, ((axis,),) = _figure(1, 1, 10, 4.8)
    axis.set(xlim=(0, 10), ylim=(-0.6, 3.95), aspect="equal")
    axis.axis("off")
    lines, corner = torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 1])
    kernels = torch.stack(
        [lines[:, None] * corner, corner[:, None] * lines, -corner[:, None] * lines]
    )
    maps = nn.functional.conv2d(image[None, None], kernels[:, None], padding=1).relu()[0]

    def tile(values: Tensor, x: float, y: float, size: float, **look) -> None:
        extent = (x - size / 2, x + size / 2, y - size / 2, y + size / 2)
        axis.imshow(values, extent=extent, interpolation="nearest", **look)

    def arrow(start: tuple, end: tuple, **look) -> None:
        look = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0} | look
        axis.annotate("", end, start, arrowprops=look)

    tile(image, 0.6, 1.75, 1.0, cmap="gray")
    axis.text(0.6, 2.35, "image", ha="center")
    for x, name in (
        (2.0, "filter"),
        (3.4, "feature map"),
        (4.75, "gate"),
        (6.1, "map, gated: $z$"),
    ):
        axis.text(x, 3.65, name, ha="center")
    for k, (kernel, seen, y) in enumerate(zip(kernels, maps, (3.0, 1.75, 0.5), strict=True)):
        closed = k == 1
        color = REMOVED if closed else INK
        arrow((1.15, 1.75), (1.65, y))
        tile(_signed(kernel, 2), 2.0, y, 0.6)
        axis.add_patch(Rectangle((1.7, y - 0.3), 0.6, 0.6, fc="none", ec=INK, lw=0.8))
        arrow((2.35, y), (2.9, y))
        tile(seen, 3.4, y, 0.9, cmap="magma")
        axis.plot((3.9, 4.6), (y, y), color=color)
        if closed:
            axis.plot((4.75, 4.75), (y - 0.28, y + 0.28), color=color, lw=5)
        else:
            for side in (-1, 1):  # the two posts of an open gate
                axis.plot((4.75, 4.75), (y + side * 0.14, y + side * 0.34), color=color, lw=5)
            arrow((4.6, y), (5.6, y))
            arrow((6.6, y), (7.3, 1.75 + 0.5 * (y - 1.75)))
        words = "$g = 0$, closed" if closed else "$g = 1$, open"
        axis.text(4.75, y - 0.54, words, ha="center", color=color, size=9)
        tile(seen * (not closed), 6.1, y, 0.9, cmap="magma", vmin=0, vmax=seen.max())
    axis.add_patch(Rectangle((7.35, 0.95), 1.2, 1.6, fc="none", ec=INK))
    axis.text(7.95, 1.75, "the rest\nof the\nnetwork", ha="center", va="center")
    arrow((8.6, 1.75), (9.2, 1.75))
    axis.text(9.55, 1.75, "cost\n$C$", ha="center", va="center")
    back = {"color": METHODS["taylor"], "ls": "--", "lw": 1.5}
    axis.add_patch(Rectangle((5.58, -0.05), 1.04, 3.58, fc="none", ec=back["color"], ls="--"))
    arrow((9.55, 1.4), (6.64, 0.15), connectionstyle="angle,angleA=-90,angleB=0,rad=15", **back)
    words = "one backward pass:\n$\\partial C/\\partial z$ for every filter"
    axis.text(8.1, 0.02, words, ha="center", va="top", color=back["color"])
    headline(figure, "A gate behind every filter: closed, it takes the filter out")
    return figure


def _signed(values: Tensor, limit: float) -> Tensor:
    """Pixels (..., 4) in red where ``values`` are positive and in blue where they are negative.

    The smaller the value, the fainter the pixel. Zero is transparent, because a page may be dark.
    """
    red, blue = torch.tensor([0.84, 0.19, 0.25]), torch.tensor([0.20, 0.50, 0.90])
    colors = torch.where(values[..., None] > 0, red, blue)
    return torch.cat([colors, (values.abs() / limit).clamp(max=1).sqrt()[..., None]], dim=-1)


def kernel_sheet(layer: str, kernels: Tensor, scores: Tensor) -> Figure:
    """All slices of a convolution's ``kernels`` (K, C, 3, 3), a column for each filter.

    The filters stand in the order of their ``scores`` (K,), the highest first.
    """
    order = scores.argsort(descending=True).tolist()
    filters, slices = kernels.shape[:2]
    figure, ((axis,),) = _figure(1, 1, 10, 0.58 * slices + 0.9)
    limit = kernels.abs().max().item()
    for column, k in enumerate(order):
        for row, values in enumerate(kernels[k]):
            extent = (column - 0.42, column + 0.42, row + 0.42, row - 0.42)
            axis.imshow(_signed(values, limit), extent=extent, interpolation="nearest")
            corner = (column - 0.42, row - 0.42)
            axis.add_patch(Rectangle(corner, 0.84, 0.84, fc="none", ec=INK, lw=0.4))
    axis.set(xlim=(-0.6, filters - 0.4), ylim=(slices - 0.4, -0.6))
    axis.set(xlabel=f"filter of {layer}, highest score first", ylabel="reads the map of filter")
    axis.set_xticks(range(filters), order)
    axis.set_yticks(range(slices))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    headline(
        figure, f"Each filter of {layer} reads {slices} maps, with one slice of its kernel each"
    )
    return figure


def two_rankings(
    above: Mapping[str, Tensor], below: Mapping[str, Tensor], names: tuple[str, str], mark: int
) -> Figure:
    """The filters from the lowest score to the highest, in two lists; a line joins each filter.

    ``mark`` separates so many of the lowest from the others.
    """
    figure, ((axis,),) = _figure(1, 1, 10, 2.9)
    colors = [LAYERS[i % len(LAYERS)] for i, values in enumerate(above.values()) for _ in values]
    numbers = [k for values in above.values() for k in range(len(values))]
    ranks = [torch.cat(list(s.values())).argsort(stable=True).argsort() for s in (above, below)]
    for upper, lower, color, number in zip(
        *(r.tolist() for r in ranks), colors, numbers, strict=True
    ):
        axis.plot((upper + 1, lower + 1), (1, 0), color=color, lw=1 if upper == lower else 2.5)
        for x, y in ((upper + 1, 1), (lower + 1, 0)):
            axis.plot([x], [y], "o", ms=17, color=color)
            axis.text(x, y, number, ha="center", va="center", color="white", size=9, weight="bold")
    axis.axvline(mark + 0.5, color=INK, ls="--", lw=1)
    axis.text(mark + 0.4, 1.42, f"the {mark} lowest", ha="right", va="center")
    axis.set(
        xlim=(0.3, len(numbers) + 0.7), ylim=(-0.4, 1.6), xlabel="place (1 is the lowest score)"
    )
    axis.set_yticks((1, 0), names)
    axis.set_xticks([1, *range(5, len(numbers) + 1, 5)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    handles = [axis.plot([], [], "o", color=LAYERS[i])[0] for i in range(len(above))]
    axis.legend(handles, above, loc="upper right", ncols=len(above), bbox_to_anchor=(1, 1.16))
    headline(figure, "Normalizing moves filters of one layer past those of the other")
    return figure


def explorer(
    images: Tensor, maps: Mapping[str, Tensor], words: Mapping[tuple[str, int], str]
) -> "VBox":
    """A slider over all filters: ``images`` (N, 1, H, W), the chosen filter's maps, and its words.

    ``maps`` are (K, N, H, W) for each layer, and ``words`` HTML for each layer and filter.
    """
    import ipywidgets
    from IPython.display import HTML, display

    def strip(values: Tensor, colors: str) -> Tensor:
        pixels = torch.from_numpy(plt.get_cmap(colors)(values.numpy(), bytes=True))
        pixels = pixels.repeat_interleave(3, 1).repeat_interleave(3, 2)
        pixels = nn.functional.pad(pixels, (0, 0, 3, 3, 3, 3))  # transparent, between the pictures
        return pixels.transpose(0, 1).flatten(1, 2)

    top = strip(images[:, 0], "gray")
    picture = ipywidgets.Image(width=top.shape[1])
    text = ipywidgets.HTML()
    names = [(f"{layer}, filter {k}", (layer, k)) for layer, k in words]
    slider = ipywidgets.SelectionSlider(options=names, description="look at")
    slider.layout.width = "90%"

    def show(_=None) -> None:
        layer, k = slider.value
        bright = (maps[layer][k] / maps[layer].max()).sqrt()
        file = io.BytesIO()
        Image.fromarray(torch.cat([top, strip(bright, "magma")]).numpy()).save(file, "PNG")
        picture.value, text.value = file.getvalue(), words[layer, k]

    slider.observe(show, names="value")
    show()
    display(HTML("<i>No slider here? Choose Run, Run All Cells.</i>"))
    return ipywidgets.VBox([slider, picture, text])


def filter_card(kernel: Tensor, feature_map: Tensor, limit: float, on: bool = True) -> bytes:
    """A small PNG for a card: a feature map beside its kernel; crossed out where it is off.

    ``kernel`` (C, 3, 3), colored from -limit to limit; ``feature_map`` (H, W) from 0 to 1, whose
    brightness is the square root of its values.
    """
    scale = 56 // feature_map.shape[0]
    left = Image.fromarray(_shades("magma")[_in_256(feature_map.sqrt())]).resize(
        [scale * n for n in feature_map.T.shape], 0
    )
    columns = 1 if len(kernel) == 1 else 2
    side = 24 if columns == 1 else 12
    card = Image.new("RGBA", (left.width + 36, left.height))
    card.paste(left)
    for i, part in enumerate(kernel):
        colors = _shades("RdBu_r")[_in_256(0.5 + 0.5 * part / limit)]
        at = (left.width + 4 + (i % columns) * (side + 2), (i // columns) * (side + 2))
        card.paste(Image.fromarray(colors).resize((side, side), 0), at)
    if not on:
        card.putalpha(card.getchannel("A").point(lambda a: a // 4))
        end = (left.width - 1, left.height - 1)
        for line in ((0, 0, *end), (0, end[1], end[0], 0)):
            ImageDraw.Draw(card).line(line, fill=REMOVED, width=4)
    file = io.BytesIO()
    card.save(file, "PNG")
    return file.getvalue()


@cache
def _shades(name: str) -> np.ndarray:
    return colormaps[name](np.arange(256), bytes=True)


def _in_256(values: Tensor) -> np.ndarray:
    return (255 * values.clamp(0, 1)).byte().numpy()


def network_cloud(
    costs: Tensor,
    counts: Tensor,
    percent: Tensor,
    losses: Tensor,
    paths: Mapping[str, tuple[Sequence[float], Sequence[float], Mapping]],
    xlabel: str,
    title: str,
    subtitle: str,
) -> Figure:
    """Many networks as a cloud of cost and loss, its front, and the paths of methods through it.

    The networks come in P groups of one cost: ``costs`` and ``counts`` (P,), and of each group the
    quantiles ``losses`` (P, Q) of the loss at ``percent`` (Q,), which go from 0 to 100.
    ``paths`` maps a name to costs, losses and options of ``plot``. The cloud is smoothed a little
    along both axes.
    """
    figure, ((axis,),) = _figure(1, 1, 7.6, 5.8)
    order = costs.argsort()
    front = losses[order, 0].cummin(0).values
    low, high = 0.93 * front.min(), losses.max()
    x, y = torch.linspace(0, 1.03 * costs.max(), 800), torch.linspace(low.log(), high.log(), 501)
    below = torch.searchsorted(costs[order].contiguous(), x, right=True) - 1
    edge = torch.where(below >= 0, front[below.clamp(min=0)], math.inf)
    # Between two quantiles, the share of the networks rises evenly with the logarithm of the loss.
    rows = [np.interp(y, group.log(), percent / 100, left=0, right=1) for group in losses]
    mass = torch.tensor(np.diff(rows, axis=1)) * counts[:, None]
    near = torch.exp(-((x[:, None] - costs) / (0.012 * costs.max())).square() / 2).to(mass)
    steps = torch.arange(len(y) - 1)
    soft = torch.exp(-((steps[:, None] - steps) / 8).square() / 2).to(mass)
    density = soft @ (near @ mass).T
    density[y[1:, None] < edge.log()] = 0
    # A shade for each power of ten below the densest place.
    shade = (density / density.max()).clamp(min=1e-9).log10().add(6).clamp(min=0).ceil()
    gray = torch.tensor(to_rgb(INK)).expand(*shade.shape, 3)
    axis.pcolormesh(x, y.exp(), torch.cat([gray, 0.11 * shade[..., None]], 2)[:, 1:].numpy())
    words = "each shade of gray:\nten times as\nmany networks"
    axis.text(0.99, 0.46, words, transform=axis.transAxes, size=11, ha="right", va="center")
    end = (1.03 * costs.max()).item()
    best = {"color": INK, "lw": 3, "label": "the best there is", "solid_capstyle": "butt"}
    axis.step([*costs[order], end], [*front, front[-1]], where="post", **best)
    for name, (xs, ys, look) in paths.items():
        axis.plot(xs, ys, label=name, **{"lw": 2, "marker": "o", "ms": 3.5, **look})
    axis.set(xlabel=xlabel, ylabel="loss on training images (nats)", yscale="log")
    axis.set(xlim=(0, x[-1]), ylim=(low, high))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    for label in (axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()):
        label.set_size(12)
    axis.tick_params(labelsize=12)
    axis.legend(fontsize=11, loc="upper right")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=16)
    axis.set_title(subtitle, size=12, pad=8, x=-0.075)
    return figure


def choices_side_by_side(
    maps: Mapping[str, Tensor], choices: Mapping[str, Mapping[str, Sequence[int]]], title: str
) -> Figure:
    """One line a choice of filters: all feature maps, with those crossed out that don't stay.

    ``maps`` (K, H, W) by layer; ``choices`` maps what is to be said of a choice to what it keeps.
    """
    filters = [(i, layer, k) for i, layer in enumerate(maps) for k in range(len(maps[layer]))]
    figure, axes = _figure(len(choices), len(filters), 12, 1.05 * len(choices) + 0.35)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.13)
    for row, (said, kept) in zip(axes, choices.items(), strict=True):
        words = row[0].text(0, 1.12, said, transform=row[0].transAxes, size=11)
        words.set_in_layout(False)  # it is as long as the row
        for axis, (i, layer, k) in zip(row, filters, strict=True):
            on = k in kept[layer]
            brightness = PowerNorm(0.5, vmin=0, vmax=max(maps[layer].max().item(), 1e-6))
            _picture(axis, maps[layer][k], cmap="magma", norm=brightness, alpha=1 if on else 0.25)
            axis.set_xlabel(k, size=9, color=LAYERS[i], labelpad=2)
            if not on:
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    axis.plot((0, end), ys, color=REMOVED, lw=2)
    headline(figure, title)
    return figure


def accuracy_by_stage(
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Tensor]]],
    whole: float,
    gaps: Mapping[str, tuple[Sequence[str], Sequence[tuple[float, float]]]],
    title: str,
) -> Figure:
    """Test accuracy stage after stage, a thin line a network and a thick one for their mean.

    ``panels`` maps a title to the names of its stages and the accuracies (networks, stages) of each
    method, named as in ``METHODS``; ``whole`` is drawn as a dotted line. The last panel has
    ``gaps``: a label to stages and, for each, (mean, half of an interval), in points.
    """
    widths = [len(stages) for stages, _ in panels.values()]
    figure, (axes,) = _figure(
        1, len(panels) + 1, 12, 3.9, gridspec_kw={"width_ratios": [*widths, max(widths)]}
    )
    for axis, (name, (stages, methods)) in zip(axes, panels.items(), strict=False):
        for method, accuracy in methods.items():
            color, x = METHODS[method], range(len(stages))
            axis.plot(x, 100 * accuracy.T, color=color, lw=0.8, alpha=0.5)
            label = method.replace("taylor", "Taylor")
            axis.plot(x, 100 * accuracy.mean(0), "o-", color=color, lw=3, label=label)
        axis.axhline(100 * whole, color=INK, lw=1, ls=":")
        axis.text(len(stages) - 1, 100 * whole, "the whole network", ha="right", va="bottom")
        axis.set(title=name, ylabel="test accuracy (%)", xlim=(-0.2, len(stages) - 0.8))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.04 * (high - low))
        axis.set_xticks(range(len(stages)), stages)
    axes[0].legend(loc="lower right")
    last = axes[-1]
    for i, (label, (stages, values)) in enumerate(gaps.items()):
        mean, half = zip(*values, strict=True)
        x = [at + 0.16 * (i - (len(gaps) - 1) / 2) for at in range(len(stages))]
        look = {"fmt": "os^v"[i], "color": METHODS["taylor"], "mfc": ("none", None)[i % 2]}
        last.errorbar(x, mean, half, capsize=3, label=label, **look)
    last.axhline(0, color=INK, lw=1, ls=":")
    longest = max((stages for stages, _ in gaps.values()), key=len)
    last.set_xticks(range(len(longest)), longest)
    last.set(title="Taylor minus random", ylabel="difference (points)")
    last.legend()
    headline(figure, title)
    return figure
