"""The figures of notebook 6: criteria beside the oracle."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import CONTROL, INK, LAYERS, METHODS, headline, subplots

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor


def sorted_changes(changes: Sequence[Mapping[str, Tensor]], titles: Sequence[str]) -> Figure:
    """For each network, the change of the loss (nats) without each filter, largest first."""
    figure, (axes,) = subplots(1, len(changes), 12, 2.6, sharey=True)
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
    figure, (axes,) = subplots(1, len(found), 11, 4, sharey=True)
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
    figure, ((axis,),) = subplots(1, 1, 8, 3.6)
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
    figure, ((axis,),) = subplots(1, 1, 9, 0.34 * len(seconds) + 1)
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
