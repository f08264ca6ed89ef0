"""The figures of notebook 1: a gate behind every filter, and what closing it costs."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import CONTROL, INK, LAYERS, METHODS, REMOVED, headline, label_ends, subplots
from figures.filters import signed

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn


def gate_diagram(image: Tensor) -> Figure:
    """A drawing of three filters that look at ``image`` (H, W), each with a gate behind its map.

    The second gate is closed. A dashed arrow shows where the gradient arrives.
    """
    figure, ((axis,),) = subplots(1, 1, 7.6, 3.9)
    axis.set(xlim=(0, 10), ylim=(-0.6, 3.95), aspect="equal")
    axis.axis("off")
    edge = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([-1.0, 0, 1])
    kernels = torch.stack([edge, edge.T, -edge.T])
    maps = nn.functional.conv2d(image[None, None], kernels[:, None], padding=1).relu()[0]

    def tile(values: Tensor, x: float, y: float, size: float, **look) -> None:
        extent = (x - size / 2, x + size / 2, y - size / 2, y + size / 2)
        axis.imshow(values, extent=extent, interpolation="nearest", **look)

    def arrow(start: tuple, end: tuple, **look) -> None:
        look = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0} | look
        axis.annotate("", end, start, arrowprops=look)

    tile(image, 0.6, 1.75, 1.0, cmap="gray")
    axis.text(0.6, 2.35, "image", ha="center")
    names = ("filter", "feature map", "gate", "map, gated: $z$")
    for x, name in zip((2.0, 3.4, 4.75, 6.1), names, strict=True):
        axis.text(x, 3.65, name, ha="center")
    for k, (kernel, seen, y) in enumerate(zip(kernels, maps, (3.0, 1.75, 0.5), strict=True)):
        closed = k == 1
        color = REMOVED if closed else INK
        arrow((1.15, 1.75), (1.65, y))
        tile(signed(kernel, 2), 2.0, y, 0.6)
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


def gate_curve(
    gates: Tensor, curves: Tensor, slopes: Tensor, k: int, at: float | None = None
) -> Figure:
    """The mean cost while the gate of filter ``k`` closes, left to right, and its tangent.

    ``curves`` (K, G) are the costs (nats) of every filter at the ``gates`` (G,), which fall from 1
    to 0, and ``slopes`` (K,) the derivatives at 1. ``at`` marks one gate, with both values; without
    it, ``k`` is the costliest filter.
    """
    figure, ((axis,),) = subplots(1, 1, 6.4, 3.6)
    tangent = curves[k, 0] + slopes[k] * (gates - 1)
    for values, style, name in ((curves[k], "-", "true cost"), (tangent, "--", "tangent")):
        axis.plot(gates, values, style, color=LAYERS[1], lw=2, label=name)
        if at is not None:
            here = values[(gates - at).abs().argmin()].item()
            axis.plot([at], [here], "o", color=LAYERS[1])
            axis.annotate(f"{here:.3f}", (at, here), (0, 8), textcoords="offset points")
    axis.set(xlim=(1, 0), xlabel="gate g (1 is open, 0 is closed)")
    axis.set(ylabel="mean cross-entropy (nats)", ylim=(None, 1.05 * curves.max().item()))
    label_ends(axis)
    finding = f"Filter {k}, the costliest: the tangent misses most of its cost"
    headline(figure, finding if at is None else f"Filter {k}, its gate at {at:.1f}")
    return figure


def slope_histograms(y: Tensor, filters: Sequence[int]) -> Figure:
    """The slopes ``y`` (N, K) of single examples for some filters, one panel above the other.

    A solid line marks the mean, and dashed ones the mean size, to both sides.
    """
    figure, axes = subplots(len(filters), 1, 6.4, 1.45 * len(filters) + 0.8, sharex=True)
    edge = 4 * y[:, list(filters)].abs().mean(0).max().item()
    for axis, k in zip(axes[:, 0], filters, strict=True):
        mean, size = y[:, k].mean().item(), y[:, k].abs().mean().item()
        axis.hist(y[:, k].clamp(-edge, edge), bins=61, range=(-edge, edge), color=LAYERS[1])
        axis.axvline(mean, color=INK, lw=2)
        for side in (-size, size):
            axis.axvline(side, color=INK, ls="--")
        axis.set_yscale("log")
        words = f"filter {k}: mean {mean:+.3f} (solid), mean size {size:.3f} (dashed)"
        axis.set_title(words.replace("-", "\u2212"), size=10)
        axis.set_ylabel("examples (log)")
    words = "slope y of one example's cost (nats); the bars at the ends hold what lies beyond"
    axes[-1, 0].set_xlabel(words)
    headline(figure, "Slopes have both signs and cancel in the mean")
    return figure


def places(orders: Mapping[str, Tensor], truth: Tensor) -> Figure:
    """The place of each filter by several scores (K,), and by the ``truth`` (K,) at the right.

    The costliest filter stands at the top. A line joins the places of one filter.
    """
    columns = [*orders.values(), truth]
    ranks = torch.stack([values.argsort().argsort() for values in columns])
    figure, ((axis,),) = subplots(1, 1, 6.4, 3.9)
    for k, places_of_k in enumerate(ranks.T.tolist()):
        moves = len({*places_of_k[:-1]}) > 1  # between the scores
        color = LAYERS[1] if moves else CONTROL
        axis.plot(range(len(columns)), places_of_k, color=color, lw=2.5 if moves else 1.5)
        for x, place in enumerate(places_of_k):
            axis.plot([x], [place], "o", ms=17, color=color)
            axis.text(x, place, k, ha="center", va="center", color="white", weight="bold")
    axis.set_xticks(range(len(columns)), [*orders, "the truth\n(oracle)"])
    axis.xaxis.tick_top()
    axis.set_yticks((0, len(truth) - 1), ("lowest", "highest"))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.margins(0.09)
    headline(figure, "Three averaging orders give three rankings (gray: all agree)")
    return figure
