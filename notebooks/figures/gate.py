"""The drawing of notebook 1: a gate behind every filter."""

from cnn_pruning.plots import INK, METHODS, REMOVED, headline, subplots
from figures.filters import signed

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn


def gate_diagram(image: Tensor) -> Figure:
    """A drawing of three filters that look at ``image`` (H, W), each with a gate behind its map.

    The second gate is closed. A dashed arrow shows where the gradient arrives.
    """
    figure, ((axis,),) = subplots(1, 1, 10, 4.8)
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
