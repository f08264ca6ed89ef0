"""The figure of notebooks 1 and 3: what is estimated for each filter, against the truth."""

import math
from collections.abc import Sequence

from cnn_pruning.plots import LAYER_NAMES, LAYERS, headline, subplots
from cnn_pruning.scores import Scores

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

NEARLY_DEAD = 100  # times less than the highest score


def estimate_against_truth(
    estimate: Scores, truth: Scores, xlabel: str, ylabel: str, title: str
) -> Figure:
    """One numbered point a filter, colored by layer, on logarithmic axes.

    Filters that are dead or nearly so, with less than ``1 / NEARLY_DEAD`` of the highest score,
    would stretch these, and a zero can't be drawn on them: the legend lists them instead.
    """
    figure, ((axis,),) = subplots(1, 1, 7.4, 5)
    lowest = max(values.max() for values in estimate.values()) / NEARLY_DEAD
    points: list[tuple[float, float, int]] = []
    for i, layer in enumerate(estimate):
        x, y = estimate[layer], truth[layer]
        alive = (x > lowest) & (y > 0)
        hidden = ", ".join(map(str, (~alive).nonzero().flatten().tolist()))
        label = LAYER_NAMES[i] + (f" (nearly dead, not drawn: filter {hidden})" if hidden else "")
        axis.scatter(x[alive], y[alive], 36, LAYERS[i], "os^v"[i], label=label, alpha=0.6)
        points += [(x[k].item(), y[k].item(), k) for k in alive.nonzero().flatten().tolist()]
    axis.set(ylabel=ylabel, xscale="log", yscale="log")
    unit = math.floor(math.log10(axis.get_xlim()[1]))
    axis.set_xlabel(f"{xlabel}, in units of $10^{{{unit}}}$")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 10**unit:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_minor_formatter(NullFormatter())
    _number(axis, points)
    axis.legend()
    headline(figure, title)
    return figure


def _number(axis: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Write the number of each point (x, y, number) where it is farthest from the others."""
    places = [(8, 7), (-8, 7), (8, -7), (-8, -7), (0, 9), (0, -9), (10, 0), (-10, 0)]  # in points
    scale = 72 / axis.figure.dpi
    taken = [scale * axis.transData.transform(point[:2]) for point in points]
    for i, (x, y, number) in enumerate(points):
        here, others = taken[i], taken[:i] + taken[i + 1 :]
        room = [min((math.dist(here + place, o) for o in others), default=0) for place in places]
        offset = places[room.index(max(room))]
        taken.append(here + offset)
        look = {"size": 8, "ha": "center", "va": "center"}
        axis.annotate(number, (x, y), offset, textcoords="offset points", **look)
