"""The figures of notebook 10: least squares, what a filter contributes, what a repair is worth."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import (
    INK,
    LAYERS,
    REMOVED,
    STAYS,
    STYLE,
    headline,
    label_ends,
    look,
    png,
    subplots,
)

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

KINDS = {"fitted images": (LAYERS[1], "s"), "other images": (LAYERS[0], "o")}


def ridge(
    errors: pd.DataFrame, missing: Mapping[str, Tensor], back: Mapping[str, Tensor], at: int
) -> Figure:
    """What a ridge of one strength gives back, and above it the errors at all strengths.

    ``errors`` are mean squares, by strength and by kind of images (``KINDS``); ``missing``
    (images,) and ``back`` (strengths, images) are what is missing in the logit of one class, and
    what is given back. ``at`` is the place of the strength that is drawn.
    """
    figure, ((above,), (below,)) = subplots(2, 1, 7, 7.4, height_ratios=(2, 3))
    strength = errors.index[at]
    for name, (color, marker) in KINDS.items():
        dots = {"color": color, "marker": marker, "ls": "none", "mew": 0}
        above.plot(errors.index, errors[name], color=color, label=name)
        above.plot(strength, errors[name].iloc[at], **dots, ms=9)
        below.plot(missing[name], back[name][at], **dots, ms=3.5, alpha=0.6, label=f"_{name}")
    above.axvline(strength, color=INK, lw=1, ls=":")
    above.set(xscale="log", xlabel="strength of the ridge", ylabel="mean squared error", ylim=0)
    above.set_xlim(errors.index[0], 20 * errors.index[-1])
    every = [*missing.values()]
    low, high = min(x.min().item() for x in every), max(x.max().item() for x in every)
    below.plot([low, high], [low, high], color=INK, lw=1)
    below.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    below.set(xlabel="missing in the logit of one class", ylabel="given back")
    below.set_title("Each dot an image; on the line, all is given back", size=10)
    headline(figure, f"Strength {strength:g}: {_verdict(errors, at)}")
    label_ends(above)
    return figure


def _verdict(errors: pd.DataFrame, at: int) -> str:
    best = int(errors["other images"].argmin())
    if errors["other images"].iloc[at] < 1.05 * errors["other images"].iloc[best]:
        return "about the best for images that were not fitted"
    return (
        "too weak, it follows the fitted images" if at < best else "too strong, it gives too little"
    )


def ridge_slider(
    errors: pd.DataFrame, missing: Mapping[str, Tensor], back: Mapping[str, Tensor], at: int
) -> ipywidgets.Widget:
    """``ridge`` with a slider over the strengths."""
    names = [(f"{strength:.2g}", i) for i, strength in enumerate(errors.index)]
    slider = ipywidgets.SelectionSlider(options=names, value=at, description="strength")
    slider.layout.width = "90%"
    picture = ipywidgets.Image(width=7 * STYLE["figure.dpi"], layout={"max_width": "100%"})

    def show(_=None) -> None:
        picture.value = png(ridge(errors, missing, back, slider.value))

    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([slider, picture])


def contributions(parts: Mapping[int, Sequence[float]], title: str) -> Figure:
    """A bar a filter: the shares (%) of its contribution that are mean, stood in for, and lost."""
    figure, ((axis,),) = subplots(1, 1, 7, 3.9)
    names = ("its mean: a bias replaces it", "other maps stand in for it", "lost")
    looks = ({"color": STAYS}, {"color": LAYERS[1]}, {"fc": "none", "ec": REMOVED, "hatch": "////"})
    bottom = [0.0] * len(parts)
    for i, (name, bar) in enumerate(zip(names, looks, strict=True)):
        heights = [100 * part[i] for part in parts.values()]
        axis.bar(range(len(parts)), heights, bottom=bottom, label=name, **bar)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(parts)), parts)
    axis.set(xlabel="filter of the second layer, the highest Taylor score first")
    axis.set(ylabel="share of its contribution (%)", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3)
    headline(figure, title)
    return figure


def accuracy_by_stage(
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Tensor]]], whole: float, title: str
) -> Figure:
    """Test accuracy (%) from stage to stage: a thin line a network, a thick one for their mean.

    ``panels`` maps a title to the names of its stages and the accuracies (networks, stages) of each
    method, named as ``plots.look`` has them; ``whole`` is drawn as a dotted line.
    """
    figure, axes = subplots(len(panels), 1, 7, 3.6 * len(panels))
    for (axis,), (name, (stages, methods)) in zip(axes, panels.items(), strict=True):
        x = range(len(stages))
        for method, accuracy in methods.items():
            line = look(method)
            axis.plot(x, accuracy.T, color=line["color"], lw=0.6, alpha=0.5)
            axis.plot(x, accuracy.mean(0), lw=2.5, label=method, **line)
        axis.plot((-0.15, len(stages) - 1), (whole, whole), color=INK, lw=1, ls=":")
        axis.text(0, whole, "the whole network", ha="left", va="bottom")
        axis.set(ylabel="test accuracy (%)", xlim=(-0.15, 1.35 * (len(stages) - 1)))
        axis.set_title(name, size=10)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.06 * (high - low))
        axis.set_xticks(x, stages)
    headline(figure, title)
    for (axis,) in axes:
        label_ends(axis)
    return figure


def differences(gaps: pd.DataFrame, title: str) -> Figure:
    """A row for each difference: its ``mean`` and ``half`` of its interval, and each network's."""
    figure, ((axis,),) = subplots(1, 1, 7, 0.5 * len(gaps) + 1.6)
    for y, (_, row) in enumerate(gaps.iterrows()):
        each = row.drop(["mean", "half"])
        axis.plot(each, [y + 0.25] * len(each), "|", color=look("taylor")["color"], ms=7)
        axis.errorbar(row["mean"], y, xerr=row["half"], fmt="o", color=INK, capsize=4)
    axis.axvline(0, color=INK, lw=1, ls=":")
    axis.set_yticks(range(len(gaps)), gaps.index)
    axis.set_ylim(len(gaps) - 0.5, -0.5)
    axis.set_xlabel("points of accuracy (strokes: networks; dot and bar: mean, interval)")
    headline(figure, title)
    return figure
