"""The figures of notebook 6: criteria beside the oracle."""

from collections.abc import Mapping, Sequence
from statistics import median

from cnn_pruning.plots import CONTROL, INK, LAYER_NAMES, LAYERS, headline, look, subplots

import torch
from matplotlib.figure import Figure
from torch import Tensor

NAMES = {
    "taylor": "Taylor, Eq. 8",
    "taylor_squared": "Taylor, squared",
    "taylor_abs_first": "absolute value first",
    "taylor_abs_last": "absolute value last",
    "weight": "weights",
    "activation_mean": "mean activation",
    "activation_std": "spread of activations",
    "apoz": "zeros (APoZ)",
    "mutual_information": "mutual information",
    "obd": "curvature (OBD), random signs",
    "obd_exact": "curvature (OBD), exact",
    "random": "random",
    "oracle": "oracle",
}
"""The criteria in words."""


def sorted_changes(changes: Sequence[Mapping[str, Tensor]], title: str) -> Figure:
    """The size of each filter's change of the loss (nats), the largest of each network first.

    Changes of zero can't stand on a logarithmic axis: they have a line of their own below it.
    """
    figure, ((axis,),) = subplots(1, 1, 7.5, 3.8)
    sizes = [torch.cat(list(change.values())).abs() for change in changes]
    lowest = min(size[size > 0].min() for size in sizes)
    zero = 10 ** (lowest.log10().floor() - 0.5)
    layers = [i for i, values in enumerate(changes[0].values()) for _ in values]
    colors = [LAYERS[i] for i in layers]
    for size in sizes:
        order = size.argsort(descending=True)
        heights = torch.where(size > 0, size, zero)[order]
        sorted_colors = [colors[k] for k in order.tolist()]
        axis.scatter(range(1, len(size) + 1), heights, 26, sorted_colors, alpha=0.8, lw=0)
    axis.axhline(zero, color=INK, lw=0.7, ls=":", zorder=0)
    axis.set(yscale="log", xlabel="filters of a network, the largest change first")
    ticks = [10.0**k for k in range(-4, 2) if zero < 10.0**k < 2 * max(s.max() for s in sizes)]
    axis.set_yticks([zero.item(), *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axis.minorticks_off()
    axis.set_ylabel("change of the loss (nats)")
    for i, name in enumerate(LAYER_NAMES[: len(changes[0])]):
        axis.scatter([], [], 40, LAYERS[i], label=f"filters of the {name}")
    axis.legend()
    headline(figure, title)
    return figure


def correlation_panels(
    found: Mapping[str, Mapping[str, tuple[float, float]]],
    by_chance: Mapping[str, tuple[float, float]],
    marks: Mapping[str, float],
    title: str,
) -> Figure:
    """One panel a way of comparing, one row a criterion: ρ with its interval, beside chance.

    ``found`` maps each way to criteria, and these to (mean, half the interval); ``by_chance`` has
    the ends of the gray band and ``marks`` the dotted line of a panel.
    """
    figure, axes = subplots(len(found), 1, 7.5, 3.1 * len(found), sharex=True)
    for (axis,), (way, criteria) in zip(axes, found.items(), strict=True):
        axis.axvspan(*by_chance[way], color=CONTROL, alpha=0.3, lw=0)
        axis.axvline(0, color=INK, lw=0.5)
        if way in marks:
            axis.axvline(marks[way], color=INK, ls=":")
        for name, (mean, half) in criteria.items():
            dot = look(name) | {"ls": "none", "ms": 7, "capsize": 3}
            axis.errorbar(mean, NAMES[name], xerr=half, **dot)
        axis.set(xlim=(-0.5, 1.05), title=way)
        axis.invert_yaxis()
    axis.set_xlabel("Spearman's ρ with oracle-abs")
    headline(figure, title)
    return figure


def rho_by_factor(
    factors: Tensor, rhos: Tensor, places: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """ρ over all filters if the scores of one layer are multiplied by a factor, raw being 1.

    ``rhos`` is (networks, factors); ``places`` maps a name to factors, one a network.
    """
    figure, ((axis,),) = subplots(1, 1, 7.5, 3.8)
    axis.plot(factors, rhos.T, color=CONTROL, alpha=0.5, lw=1)
    axis.plot(factors, rhos.mean(0), color=look("taylor")["color"], lw=3)
    top = 1.0
    for row, (name, at) in enumerate(places.items()):
        height = top + 0.06 + 0.075 * (len(places) - 1 - row)
        axis.plot((min(at), max(at)), (height, height), color=INK, lw=3, clip_on=False)
        if min(at) == max(at):
            axis.plot(at[0], height, "o", color=INK, ms=5)
        axis.annotate(name, (max(at), height), (7, 0), textcoords="offset points", va="center")
        axis.axvline(median(at), color=INK, lw=0.8, ls=":", zorder=0)
    axis.set(xscale="log", xlabel="factor on the scores of the first layer")
    axis.set_ylabel("Spearman's ρ over all filters")
    axis.set_ylim(top=top + 0.06 + 0.075 * len(places))
    axis.set_yticks([tick / 5 for tick in range(6) if tick / 5 >= axis.get_ylim()[0]])
    axis.xaxis.set_major_formatter("{x:g}")
    headline(figure, title)
    return figure


def cost_against_rho(seconds: Mapping[str, float], rhos: Mapping[str, float], title: str) -> Figure:
    """One point a criterion: its seconds, and the ρ of its raw scores over all filters."""
    figure, ((axis,),) = subplots(1, 1, 7.5, 4.6)
    right = max(seconds.values()) / 6
    for name, x in seconds.items():
        axis.plot(x, rhos[name], **look(name) | {"ls": "none", "ms": 9})
        side = {"ha": "right"} if x > right else {"ha": "left"}
        place = (-8 if x > right else 8, 0)
        axis.annotate(
            NAMES[name], (x, rhos[name]), place, textcoords="offset points", va="center", **side
        )
    axis.set(xscale="log", xlabel="seconds", ylabel="Spearman's ρ with oracle-abs")
    axis.xaxis.set_major_formatter("{x:g}")
    headline(figure, title)
    return figure
