"""The figures of notebook 8: all networks, and single choices among them."""

import math
from collections.abc import Mapping, Sequence

from cnn_pruning.plots import (
    CONTROL,
    INK,
    LAYER_NAMES,
    LAYERS,
    REMOVED,
    bare_image,
    headline,
    label_ends,
    look,
    subplots,
)

import numpy as np
import torch
from matplotlib.colors import LogNorm, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor


def two_halves(losses: Tensor, marks: Mapping[str, int], title: str) -> Figure:
    """The loss (nats) of every subset as one pixel: a row is one half's subset, a column the other.

    ``losses`` (R C,), with R = C a power of two; ``marks`` names two subsets by index. Beside the
    rows and below the columns stand the gates, dark where a filter is kept.
    """
    side = math.isqrt(len(losses))
    width = side.bit_length() - 1
    gates = torch.arange(side)[:, None] >> torch.arange(width - 1, -1, -1) & 1
    figure, axes = subplots(
        2, 2, 6.6, 6.6, width_ratios=(1, 8), height_ratios=(8, 1), sharex="col", sharey="row"
    )
    (rows, picture), (corner, columns) = axes
    shown = picture.imshow(losses.view(side, side), cmap="viridis_r", norm=LogNorm(), aspect="auto")
    for axis, values in ((rows, gates), (columns, gates.T)):
        axis.imshow(values, cmap="Greys", vmax=1.6, aspect="auto", interpolation="nearest")
    rows.set_ylabel(f"256 subsets of filters 0 to {width - 1}")
    rows.set_xticks((0, width - 1), ("0", str(width - 1)))
    columns.set_xlabel(f"256 subsets of filters {width} to {2 * width - 1}")
    columns.set_yticks((0, width - 1), (str(width), str(2 * width - 1)))
    corner.axis("off")
    for axis in (rows, picture):
        axis.tick_params(left=False, labelleft=False)
    for axis in (picture, columns):
        axis.tick_params(bottom=False, labelbottom=False)
    rows.tick_params(labelbottom=True)  # a shared axis hides them
    columns.tick_params(labelleft=True)
    placed = sorted(marks.items(), key=lambda mark: mark[1] % side)
    for (name, index), sign, ha in zip(placed, (-1, 1), ("right", "left"), strict=True):
        y, x = divmod(index, side)
        picture.plot(x, y, "o", ms=11, mec=REMOVED, mfc="none", mew=2.5)
        words = {"color": INK, "weight": "bold", "bbox": {"fc": "w", "ec": "none", "alpha": 0.85}}
        words |= {"ha": ha, "va": "center", "textcoords": "offset points"}
        picture.annotate(name, (x, y), (13 * sign, 0), **words)
    bar = figure.colorbar(shown, ax=axes, label="loss (nats)", shrink=0.7, format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    headline(figure, title)
    return figure


def subset_lines(
    edges: Tensor, mean: Tensor, paths: Mapping[str, tuple[str, Sequence[float]]], title: str
) -> Figure:
    """All subsets of a layer by size, the whole layer at the left, and what the methods choose.

    ``edges`` (4, sizes) has the lowest loss (nats), both quartiles and the highest of 0, 1, ...
    filters kept, and ``mean`` their mean; ``paths`` maps a name to a method and its losses.
    """
    figure, ((axis,),) = subplots(1, 1, 7.5, 4.6)
    counts = range(len(mean))
    low, q1, q3, high = edges
    axis.fill_between(counts, low, high, color=CONTROL, alpha=0.25, lw=0)
    axis.fill_between(counts, q1, q3, color=CONTROL, alpha=0.45, lw=0)
    axis.plot(counts, mean, label="chance, mean", **look("random") | {"marker": "", "lw": 2})
    for name, (method, losses) in paths.items():
        line = look(method)
        if name.endswith("re-scored"):
            line |= {"mfc": "white", "ls": ":"}
        axis.plot(counts, losses, label=name, **line)
    axis.set(xlabel=f"filters kept, of {len(mean) - 1}", yscale="log")
    axis.set_xlim(len(mean) - 0.5, -0.5)
    axis.set_xticks(range(0, len(mean), 2))
    axis.set_ylabel("loss on training images (nats)")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(loc="upper left", fontsize=9)
    headline(figure, title)
    return figure


def against_the_truth(
    estimates: Mapping[str, Mapping[str, Sequence[float]]],
    truth: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Estimates of each filter's change of the loss (nats) against the true one, by layer."""
    figure, ((axis,),) = subplots(1, 1, 7.5, 5)
    for (name, values), marker in zip(estimates.items(), "o^", strict=True):
        for i, layer in enumerate(truth):
            label = f"{name}, {LAYER_NAMES[i]}"
            shape = {"marker": marker, "facecolors": LAYERS[i] if marker == "^" else "none"}
            axis.scatter(
                values[layer], truth[layer], 34, edgecolors=LAYERS[i], label=label, **shape
            )
    ends = (3e-4, 2)
    axis.plot(ends, ends, color=INK, lw=0.8, ls=":")
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set(xlabel="estimate (nats)", ylabel="true change of the loss (nats)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.legend()
    headline(figure, title)
    return figure


def pair_costs(matrices: Sequence[Tensor], titles: Sequence[str], title: str) -> Figure:
    """What pairs of filters cost more together (nats), each (K, K), all on one scale of colors."""
    figure, (axes,) = subplots(1, len(matrices), 7.5, 3.2)
    limit = max(matrix.nan_to_num().abs().max() for matrix in matrices)
    for axis, matrix, name in zip(axes, matrices, titles, strict=True):
        picture = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[], title=name)
    axes[0].set_ylabel("filter")
    axes[0].set_xlabel("the least important first")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8)
    bar.set_label("extra cost of the pair (nats)")
    headline(figure, title)
    return figure


def before_and_after(
    tuned: Mapping[str, Sequence[tuple[float, float]]], methods: Mapping[str, str], title: str
) -> Figure:
    """Accuracy (%) before and after a training: a thin line a network, a thick one for the mean.

    ``tuned`` maps a choice to (before, after) of each network, and ``methods`` to its look;
    a choice that no method made has the ink.
    """
    figure, ((axis,),) = subplots(1, 1, 7.5, 5.4)
    for name, pairs in tuned.items():
        line = look(methods.get(name, ""))
        for pair in pairs:
            axis.plot((0, 1), pair, color=line["color"], lw=0.8, alpha=0.5)
        mean = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        axis.plot((0, 1), mean, label=name, lw=2.5, **line | {"ms": 8})
    axis.set_xticks((0, 1), ("before fine-tuning", "after it"))
    axis.set(xlim=(-0.15, 1.6), ylabel="validation accuracy (%)")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.12 * (high - low))  # the best end close together: room for names
    headline(figure, title)
    label_ends(axis)
    return figure


def network_cloud(
    costs: Tensor,
    counts: Tensor,
    percent: Tensor,
    losses: Tensor,
    paths: Mapping[str, tuple[Sequence[float], Sequence[float], str]],
    xlabel: str,
    title: str,
    subtitle: str,
) -> Figure:
    """Many networks as a cloud of cost and loss, its front, and the paths of methods through it.

    The networks come in P groups of one cost: ``costs`` and ``counts`` (P,), and of each group the
    quantiles ``losses`` (P, Q) of the loss at ``percent`` (Q,), which go from 0 to 100.
    ``paths`` maps a name to costs, losses and the method whose look it has. The whole network
    stands at the left, and the cloud is smoothed a little along both axes.
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
    axis.text(0.01, 0.46, words, transform=axis.transAxes, size=11, va="center")
    end = (1.03 * costs.max()).item()
    best = {"color": INK, "lw": 3, "label": "the best there is", "solid_capstyle": "butt"}
    axis.step([*costs[order], end], [*front, front[-1]], where="post", **best)
    for name, (xs, ys, method) in paths.items():
        line = look(method) | {"lw": 2, "ms": 4, "label": name}
        if name.endswith("re-scored"):
            line |= {"mfc": "white", "ls": ":"}
        if method == "random":  # a mean over sizes, no network
            line |= {"marker": ""}
        else:  # as the best there is: between two networks, the smaller one
            line |= {"drawstyle": "steps-post"}
        axis.plot(*zip(*sorted(zip(xs, ys, strict=True)), strict=True), **line)
    axis.set_xlabel(xlabel, size=12)
    axis.set_ylabel("loss on training images (nats)", size=12)
    axis.set(yscale="log", xlim=(x[-1], 0), ylim=(low, high))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=12)
    axis.legend(fontsize=11, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=16)
    axis.set_title(subtitle, size=12, pad=8, x=-0.075)
    return figure


def choices_side_by_side(
    maps: Mapping[str, Tensor], choices: Mapping[str, Mapping[str, Sequence[int]]], title: str
) -> Figure:
    """Two lines a choice of filters: all feature maps, with those crossed out that don't stay.

    ``maps`` (K, H, W) by layer; ``choices`` maps what is to be said of a choice to what it keeps.
    """
    filters = [(i, layer, k) for i, layer in enumerate(maps) for k in range(len(maps[layer]))]
    columns = len(filters) // 2
    figure, axes = subplots(2 * len(choices), columns, 7.5, 2.1 * len(choices) + 0.4)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.14)
    for rows, (said, kept) in zip(axes.reshape(-1, 2 * columns), choices.items(), strict=True):
        words = rows[0].text(0, 1.12, said, transform=rows[0].transAxes, size=11)
        words.set_in_layout(False)  # it is as long as the row
        for axis, (i, layer, k) in zip(rows, filters, strict=True):
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
