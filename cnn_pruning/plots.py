"""The palette, and the figures of the command and of more than one notebook."""

import base64
import html
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from cnn_pruning.scores import Filters, Scores

# One color for a thing, in every figure. Colors that meet in one figure are at least 20 apart in
# CIELAB for each kind of color blindness, too (tests/test_palette.py); lines also differ in
# markers and dashes. The page behind is white in a dark notebook as well: no ink can be read on
# both, and a dark one is easier on the eyes.
PAGE = "#FFFFFF"
INK = "#1F1F1F"  # words, axes and lines that stand for no method
LAYERS = ("#284E90", "#CE8711", "#449B65", "#977E9D")
LAYER_NAMES = ("first layer", "second layer", "third layer", "fourth layer")
REMOVED = "#B01119"
STAYS = "#C4C4C4"
CONTROL = "#A39599"
_GREEN, _PURPLE, _ORANGE, _GRAY = "#32A75B", "#850398", "#D67E14", "#62575A"
_LOOKS = {  # color, marker and dashes; variants share their color
    "taylor": (_GREEN, "o", "-"),
    "fine-tuned": (_GREEN, "o", "-"),
    "one shot": (_GREEN, "D", "--"),
    "taylor_abs_first": (_GREEN, "H", ":"),
    "oracle": (_PURPLE, "s", (0, (5, 1.5))),
    "oracle_abs": (_PURPLE, "s", (0, (5, 1.5))),
    "greedy": ("#6636E4", "P", (0, (5, 1.5, 1, 1.5))),
    "weight": ("#7E93C5", "^", (0, (3, 1.5, 1, 1.5, 1, 1.5))),
    "activation_mean": (_GRAY, "<", "-."),
    "apoz": (_GRAY, ">", ":"),
    "obd": (_GRAY, "*", "--"),
    "random": (CONTROL, "X", (0, (1.5, 1))),
    "random, same layers": (CONTROL, "d", (0, (4, 2))),
    "baseline": (_GRAY, "h", (0, (8, 2))),
    "baseline, more epochs": (_GRAY, "p", (0, (2, 2))),
    "scratch": (_ORANGE, "v", (0, (6, 1, 2, 1))),
    "scratch, same epochs": (_ORANGE, "1", ":"),
}
METHODS = {name: color for name, (color, _, _) in _LOOKS.items()}
NAMES = {"taylor": "Taylor", "weight": "weights", "activation_mean": "mean activation"}
NAMES |= {"apoz": "zeros (APoZ)"}
"""What the reader sees, of methods whose names are those of functions."""
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), PAGE),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top"), False),
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.use_mathtext": True,
    "axes.titlelocation": "left",
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "hatch.color": REMOVED,
    "legend.frameon": False,
    "lines.markersize": 5,
}


def use_style() -> None:
    """Draw all figures alike."""
    plt.rcParams.update(STYLE)


def look(method: str) -> dict:
    """Color, marker and line style of a method, for ``Axes.plot``.

    ``"scratch, same compute"`` looks as ``"scratch"`` does, and an unknown name has the ink.
    """
    known = method if method in _LOOKS else method.split(",")[0]
    color, marker, dashes = _LOOKS.get(known, (INK, ".", "-"))
    return {"color": color, "marker": marker, "ls": dashes}


def label_ends(axis: Axes, size: float = 9) -> None:
    """Write the name of each labeled line at its right end, in place of a legend.

    Call it last, when the limits of the axes are set. Names are those of ``NAMES``, and keep clear
    of each other.
    """
    figure = axis.figure.get_figure(root=True)
    figure.draw_without_rendering()  # so that the axes have their places
    point = figure.dpi / 72  # in pixels
    (_, bottom), (right, top) = axis.bbox.get_points()
    ends = []
    for line in axis.get_lines():
        places = axis.transData.transform(line.get_xydata())
        drawn = [(x, y) for x, y in places if math.isfinite(x + y) and x <= right + 1]
        if drawn and not line.get_label().startswith("_"):
            x, y = max(drawn)
            ends.append([min(max(y, bottom), top), x, line])
    ends.sort(key=lambda end: end[0])
    for order, sign in ((ends, 1), (ends[::-1], -1)):  # up, and down again where that was too far
        for i, (y, x, _) in enumerate(order):
            near = [other for other in order[:i] if abs(other[1] - x) < 90 * point]
            clear = [other[0] + sign * 1.25 * size * point for other in near]
            order[i][0] = max([y, *clear]) if sign > 0 else min([y, top, *clear])
    halo = [withStroke(linewidth=3, foreground=PAGE)]
    for y, x, line in ends:
        mixed = zip(to_rgb(line.get_color()), to_rgb(INK), strict=True)
        color = [sum(both) / 2 for both in mixed]  # letters need more contrast than lines
        words = {"color": color, "size": size, "va": "center", "path_effects": halo}
        place = axis.transAxes.inverted().transform((x, y))
        name = NAMES.get(line.get_label(), line.get_label())
        axis.annotate(name, place, (6, 0), "axes fraction", "offset points", **words)


def headline(figure: Figure, text: str) -> None:
    """Say above the whole figure, in bold, what there is to see."""
    lines = textwrap.fill(text, int(9.5 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", weight="bold")


def png(figure: Figure, **options) -> bytes:
    """The figure as a PNG, for an ``ipywidgets.Image``, with two pixels where the page has one.

    Give the widget the figure's width on the page: inches times ``STYLE["figure.dpi"]``. The
    ``options`` are ``savefig``'s. 256 colors are enough, in less than half of the bytes.
    """
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * STYLE["figure.dpi"], **options)
    plt.close(figure)
    few = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(small, "PNG", optimize=True)
    return small.getvalue()


def described(figure: Figure, text: str) -> None:
    """Show a figure in the notebook, with a text for those who can't see it, and close it.

    JupyterLab has no such text for the figures that it shows by itself.
    """
    from IPython.display import display

    picture = png(figure, bbox_inches="tight")
    width = Image.open(io.BytesIO(picture)).width // 2
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    page = f'<img alt="{html.escape(text)}" width="{width}" src="{source}">'
    display({"text/html": page, "text/plain": text}, raw=True)


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

    A name has its ``look``. A row's ``epoch`` is where it is drawn, so that a later training can
    start where another ended; a row without ``train_loss`` is a network before that training.
    """
    figure, ((above,), (below,)) = subplots(2, 1, 7.5, 5.4, sharex=True)
    for name, rows in histories.items():
        line = look(name)
        epochs = [row["epoch"] for row in rows]
        for axis, key, scale in ((above, "val_loss", 1), (below, "val_accuracy", 100)):
            axis.plot(epochs, [scale * row[key] for row in rows], label=name, **line | {"ls": "-"})
        losses = [row.get("train_loss", math.nan) for row in rows]
        above.plot(epochs, losses, color=line["color"], ls=":", lw=1.2)
    above.set_title("Loss on validation images (dotted: on training images)", size=10)
    above.set_ylabel("cross-entropy (nats)")
    below.set_title("Accuracy on validation images", size=10)
    below.set(xlabel="epoch", ylabel="accuracy (%)")
    below.xaxis.get_major_locator().set_params(integer=True)
    headline(figure, title)
    for axis in (above, below):
        label_ends(axis)
    return figure


def score_bars(scores: Scores, ylabel: str, title: str, removed: Filters | None = None) -> Figure:
    """One bar a filter, layer beside layer on one scale; ``removed`` filters are hatched."""
    widths = [len(values) for values in scores.values()]
    figure, (axes,) = subplots(1, len(scores), 8, 3.2, sharey=True, width_ratios=widths)
    for i, (axis, (layer, values)) in enumerate(zip(axes, scores.items(), strict=True)):
        bars = axis.bar(range(len(values)), values.tolist(), color=LAYERS[i % len(LAYERS)])
        for k in (removed or {}).get(layer, []):
            bars[k].set(facecolor="none", edgecolor=REMOVED, hatch="////")
        place = f"the {LAYER_NAMES[i]}" if i < len(LAYER_NAMES) else layer
        axis.set(xlabel=f"filter of {place}", xticks=range(len(values)))
    axes[0].set_ylabel(ylabel)
    headline(figure, title)
    return figure
