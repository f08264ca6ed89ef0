"""The figures of notebook 8: all networks, and single choices among them."""

import math
from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, LAYERS, REMOVED, bare_image, headline, subplots

import numpy as np
import torch
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor


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
    figure, ((axis,),) = subplots(1, 1, 7.6, 5.8)
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
    axis.set_xlabel(xlabel, size=12)
    axis.set_ylabel("loss on training images (nats)", size=12)
    axis.set(yscale="log", xlim=(0, x[-1]), ylim=(low, high))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
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
    figure, axes = subplots(len(choices), len(filters), 12, 1.05 * len(choices) + 0.35)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.13)
    for row, (said, kept) in zip(axes, choices.items(), strict=True):
        words = row[0].text(0, 1.12, said, transform=row[0].transAxes, size=11)
        words.set_in_layout(False)  # it is as long as the row
        for axis, (i, layer, k) in zip(row, filters, strict=True):
            on = k in kept[layer]
            brightness = PowerNorm(0.5, vmin=0, vmax=max(maps[layer].max().item(), 1e-6))
            bare_image(axis, maps[layer][k], cmap="magma", norm=brightness, alpha=1 if on else 0.25)
            axis.set_xlabel(k, size=9, color=LAYERS[i], labelpad=2)
            if not on:
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    axis.plot((0, end), ys, color=REMOVED, lw=2)
    headline(figure, title)
    return figure
