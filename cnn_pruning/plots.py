"""The palette, and the figures of the command and of more than one notebook."""

import base64
import io
import math
import sys
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from torch import Tensor

from cnn_pruning.scores import Filters, Scores

# One color for a thing, in every figure, on a light page and on a dark one. The layers and the
# removed filters have Okabe and Ito's; the methods keep their distance from the first two layers,
# from removed filters, and from each other, for color-blind readers too.
INK = "#7B7B7B"  # words, axes and lines that stand for no method
LAYERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
REMOVED = "#D55E00"
STAYS = "#B8B8B8"
CONTROL = "#A0A0A0"
METHODS = {
    # what Taylor left has its color
    **dict.fromkeys(("taylor", "fine-tuned", "one shot"), "#009068"),
    "taylor_abs_first": "#6CC9AE",
    **dict.fromkeys(("oracle", "oracle_abs"), "#A84C7E"),
    "greedy": "#8450DA",
    "weight": "#62B8F0",
    "activation_mean": "#A9B04A",
    "apoz": "#9E5B18",
    "obd": "#5F58C8",
    **dict.fromkeys(("random", "random, like taylor"), CONTROL),
    "baseline": "#666666",
    "scratch": "#8B80F9",
}
NEARLY_DEAD = 100  # times less than the highest score
_WORDS = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
STYLE = {
    **dict.fromkeys(_WORDS, INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.use_mathtext": True,
    "axes.titlelocation": "left",
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "hatch.color": REMOVED,
    "legend.frameon": False,
}


def use_style() -> None:
    """Draw all figures alike; in a notebook, with two pixels where the page has one."""
    plt.rcParams.update(STYLE)
    ipython = sys.modules.get("IPython")
    if not ipython or not (shell := ipython.get_ipython()):
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


def subplots(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    """Return a figure, in inches, and its axes (rows, columns), for a function that returns it."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, **options
        )
    plt.close(figure)  # the notebook shows what it is given, once
    return figure, axes


def bare_image(axis: Axes, values: Tensor, **options) -> None:
    """Draw pixels, sharp and in a small file, without a frame."""
    axis.imshow(values, interpolation="nearest", **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def curves(histories: Mapping[str, Sequence[Mapping]], title: str) -> Figure:
    """Loss and accuracy by epoch; ``histories`` maps a name to the rows of ``fit``.

    A name in ``METHODS`` has the color from there, any other that of the baseline. A row's
    ``epoch`` is where it is drawn, so that a later training can start where another ended; a row
    without ``train_loss`` is a network as it was before that training.
    """
    figure, ((left, right),) = subplots(1, 2, 10, 3.6)
    for name, rows in histories.items():
        color = METHODS.get(name, METHODS["baseline"])
        epochs = [row["epoch"] for row in rows]
        for key, style in (("train_loss", "--"), ("val_loss", "-"), ("val_accuracy", "-")):
            axis, scale = (right, 100) if key == "val_accuracy" else (left, 1)
            values = [scale * row.get(key, math.nan) for row in rows]
            label = f"{name}, {'training' if key == 'train_loss' else 'validation'}"
            axis.plot(epochs, values, style, color=color, marker="o", ms=4, label=label)
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy on validation images")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        if histories:
            axis.legend(fontsize=8, handlelength=3.5)
    headline(figure, title)
    return figure


def score_bars(scores: Scores, ylabel: str, title: str, removed: Filters | None = None) -> Figure:
    """One bar a filter, layer beside layer on one scale; ``removed`` filters are hatched."""
    widths = [len(values) for values in scores.values()]
    figure, (axes,) = subplots(1, len(scores), 10, 3.2, sharey=True, width_ratios=widths)
    for i, (axis, (layer, values)) in enumerate(zip(axes, scores.items(), strict=True)):
        bars = axis.bar(range(len(values)), values.tolist(), color=LAYERS[i % len(LAYERS)])
        for k in (removed or {}).get(layer, []):
            bars[k].set(facecolor="none", edgecolor=REMOVED, hatch="////")
        axis.set(xlabel=f"filter of convolution {i + 1} ({layer})", xticks=range(len(values)))
    axes[0].set_ylabel(ylabel)
    headline(figure, title)
    return figure


def estimate_against_truth(
    estimate: Scores, truth: Scores, xlabel: str, ylabel: str, title: str
) -> Figure:
    """One numbered point a filter, colored by layer, on logarithmic axes.

    Filters that are dead or nearly so, with less than ``1 / NEARLY_DEAD`` of the highest score,
    would stretch these, and a zero can't be drawn on them: the legend names them instead.
    """
    figure, ((axis,),) = subplots(1, 1, 7.4, 5)
    lowest = max(values.max() for values in estimate.values()) / NEARLY_DEAD
    points: list[tuple[float, float, int, str]] = []
    for i, layer in enumerate(estimate):
        x, y, color = estimate[layer], truth[layer], LAYERS[i % len(LAYERS)]
        alive = (x > lowest) & (y > 0)
        hidden = ", ".join(map(str, (~alive).nonzero().flatten().tolist()))
        label = f"convolution {i + 1} ({layer})"
        label += f"; dead or nearly dead, not drawn: {hidden}" if hidden else ""
        axis.scatter(x[alive], y[alive], s=36, color=color, label=label)
        points += [(x[k].item(), y[k].item(), k, color) for k in alive.nonzero().flatten().tolist()]
    axis.set(ylabel=ylabel, title=title, xscale="log", yscale="log")
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
    taken = [scale * axis.transData.transform(point[:2]) for point in points]
    for i, (x, y, number, color) in enumerate(points):
        here, others = taken[i], taken[:i] + taken[i + 1 :]
        room = [min((math.dist(here + place, o) for o in others), default=0) for place in places]
        offset = places[room.index(max(room))]
        taken.append(here + offset)
        look = {"color": color, "size": 8, "ha": "center", "va": "center"}
        axis.annotate(number, (x, y), offset, textcoords="offset points", **look)
