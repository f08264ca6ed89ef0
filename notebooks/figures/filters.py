"""The figures of notebook 3: what filters look like, what they see, and their scores."""

import io
import math
from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, LAYER_NAMES, LAYERS, METHODS, bare_image, headline, subplots

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn


def filter_cards(
    place: str,
    images: Tensor,
    maps: Tensor,
    scores: Tensor,
    color: str,
    kernels: Tensor | None = None,
) -> Figure:
    """One row a filter, best score first: its kernel, its feature maps on images, its score.

    ``place`` is the layer's name for people, ``images`` (N, 1, H, W), ``maps`` (K, N, H, W),
    ``scores`` (K,), and ``kernels`` (K, 3, 3) if each filter has one slice. The brightness of a map
    is the square root of its values.
    """
    order = scores.argsort(descending=True).tolist()
    widths = [1 if kernels is not None else 0.4, *[1] * len(images), 2.2]
    rows, columns = len(order) + 1, len(images) + 2
    look = {"gridspec_kw": {"width_ratios": widths}}
    figure, axes = subplots(rows, columns, 7.6, 0.52 * rows + 0.5, **look)
    for axis, image in zip(axes[0, 1:], images, strict=False):
        bare_image(axis, image[0], cmap="gray")
    for axis in (axes[0, 0], axes[0, -1]):
        axis.axis("off")
    axes[0, 0].set_title("filter" if kernels is None else "kernel", size=10, loc="center", y=0)
    unit = math.floor(math.log10(scores.max().item()))
    axes[0, -1].set_title(f"score ($10^{{{unit}}}$)", size=10, y=0)
    brightness = PowerNorm(0.5, vmin=0, vmax=maps.max().item())  # dim maps have shapes too
    for row, k in zip(axes[1:], order, strict=True):
        if kernels is None:
            row[0].axis("off")
            row[0].text(0.5, 0.5, k, ha="center", va="center", size=10)
        else:
            bare_image(row[0], signed(kernels[k], kernels.abs().max().item()))
            row[0].spines[:].set_visible(True)
            row[0].set_ylabel(f"{k}  ", rotation=0, ha="right", va="center", size=10)
        for axis, values in zip(row[1:], maps[k], strict=False):
            bare_image(axis, values, cmap="magma", norm=brightness)
        row[-1].barh([0], [scores[k]], color=color)
        row[-1].set(xlim=(0, 1.6 * scores.max()), ylim=(-0.8, 0.8), xticks=[], yticks=[])
        words = f"{scores[k] / 10**unit:.2f}"
        row[-1].text(scores[k] + 0.05 * scores.max(), 0, words, va="center", size=10)
        row[-1].spines["bottom"].set_visible(False)
    headline(figure, f"What the filters of the {place} see, highest score first")
    return figure


def kernel_sheet(place: str, kernels: Tensor, scores: Tensor) -> Figure:
    """All slices of a convolution's ``kernels`` (K, C, 3, 3), a column for each filter.

    The filters of the layer, which people call ``place``, stand in the order of their ``scores``
    (K,), the highest first.
    """
    order = scores.argsort(descending=True).tolist()
    filters, slices = kernels.shape[:2]
    figure, ((axis,),) = subplots(1, 1, 7.4, 0.42 * slices + 1)
    limit = kernels.abs().max().item()
    for column, k in enumerate(order):
        for row, values in enumerate(kernels[k]):
            extent = (column - 0.42, column + 0.42, row + 0.42, row - 0.42)
            axis.imshow(signed(values, limit), extent=extent, interpolation="nearest")
            corner = (column - 0.42, row - 0.42)
            axis.add_patch(Rectangle(corner, 0.84, 0.84, fc="none", ec=INK, lw=0.4))
    axis.set(xlim=(-0.6, filters - 0.4), ylim=(slices - 0.4, -0.6))
    axis.set(xlabel=f"filter of the {place}, highest score first", ylabel="reads the map of filter")
    axis.set_xticks(range(filters), order)
    axis.set_yticks(range(slices))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    headline(figure, f"Each filter of the {place} reads {slices} maps, with one slice for each")
    return figure


def signed(values: Tensor, limit: float) -> Tensor:
    """Pixels (..., 4) in red where ``values`` are positive and in blue where they are negative.

    The smaller the value, the fainter the pixel. Zero is transparent, because a page may be dark.
    """
    red, blue = torch.tensor([0.84, 0.19, 0.25]), torch.tensor([0.20, 0.50, 0.90])
    colors = torch.where(values[..., None] > 0, red, blue)
    return torch.cat([colors, (values.abs() / limit).clamp(max=1).sqrt()[..., None]], dim=-1)


def rankings(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: tuple[str, str], mark: int
) -> Figure:
    """All filters in two columns, the highest score at the top; a line joins each filter.

    ``mark`` separates so many of the lowest from the others.
    """
    figure, ((axis,),) = subplots(1, 1, 5.6, 7)
    colors = [LAYERS[i % len(LAYERS)] for i, values in enumerate(left.values()) for _ in values]
    numbers = [k for values in left.values() for k in range(len(values))]
    ranks = [torch.cat(list(s.values())).argsort(stable=True).argsort() for s in (left, right)]
    for *places, color, number in zip(*(r.tolist() for r in ranks), colors, numbers, strict=True):
        axis.plot((0, 1), places, color=color, lw=1 if places[0] == places[1] else 2.5)
        for x, y in enumerate(places):
            axis.plot([x], [y], "o", ms=15, color=color)
            axis.text(x, y, number, ha="center", va="center", color="white", size=9, weight="bold")
    axis.axhline(mark - 0.5, color=INK, ls="--", lw=1)
    axis.text(1.12, mark - 0.9, f"the {mark} lowest", va="top")
    for i, (name, color) in enumerate(zip(LAYER_NAMES[:2], LAYERS, strict=False)):
        axis.text(1.12, len(numbers) - 2 - 1.3 * i, name, color=color, weight="bold")
    axis.set(xlim=(-0.1, 1.6), ylim=(-0.7, len(numbers) - 0.3))
    axis.set_xticks((0, 1), names)
    axis.xaxis.tick_top()
    axis.set_yticks((0, len(numbers) - 1), ("lowest", "highest"))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    headline(figure, "Normalizing moves filters of one layer past those of the other")
    return figure


def class_shares(shares: Mapping[str, Tensor], classes: Sequence[str]) -> Figure:
    """The part of each class's scores (classes, K) that each filter has, in percent, by layer."""
    heights = [share.shape[1] for share in shares.values()]
    size = {"height_ratios": heights, "sharex": True}
    figure, axes = subplots(len(shares), 1, 6, 0.26 * sum(heights) + 1.4, **size)
    top = 100 * max(share.max().item() for share in shares.values())
    for axis, name, share in zip(axes[:, 0], LAYER_NAMES, shares.values(), strict=False):
        image = axis.imshow(100 * share.T, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        axis.set(ylabel=f"filter of the {name}", yticks=range(share.shape[1]))
    axes[-1, 0].set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    figure.colorbar(image, ax=axes[:, 0], label="share of the class's scores (%)", pad=0.02)
    headline(figure, "The classes need the same filters, but not equally")
    return figure


def by_images(sizes: Sequence[int], rank: Tensor, agree: Tensor, most: int) -> Figure:
    """What scores from few images are worth, against all: two panels over the number of images.

    ``rank`` (draws, sizes) are rank correlations, and ``agree`` counts of the ``most`` lowest
    filters in common. Lines are means, and bands reach from the lowest draw to the highest.
    """
    figure, axes = subplots(2, 1, 6.4, 5.2, sharex=True)
    color = METHODS["taylor"]
    for axis, values in zip(axes[:, 0], (rank, agree), strict=True):
        axis.plot(sizes, values.mean(0), "o-", color=color)
        axis.fill_between(sizes, values.amin(0), values.amax(0), color=color, alpha=0.2, lw=0)
    above, below = axes[:, 0]
    above.set_ylabel("rank correlation")
    above.set_title("All filters, by raw scores", size=10)
    below.set(ylabel=f"in common (of {most})", xlabel="images scored", ylim=(None, most))
    below.set_title("The lowest, by normalized scores", size=10)
    below.set(xscale="log", xticks=sizes, xticklabels=sizes)
    below.minorticks_off()
    headline(figure, "A few hundred images give almost the ranking of all 55,000")
    return figure


def explorer(
    images: Tensor, maps: Mapping[str, Tensor], words: Mapping[tuple[str, int], str]
) -> ipywidgets.VBox:
    """A slider over all filters: ``images`` (N, 1, H, W), the chosen filter's maps, and its words.

    ``maps`` are (K, N, H, W) for each layer, and ``words`` HTML for each layer and filter.
    """

    def strip(values: Tensor, colors: str) -> Tensor:
        pixels = torch.from_numpy(plt.get_cmap(colors)(values.numpy(), bytes=True))
        pixels = pixels.repeat_interleave(3, 1).repeat_interleave(3, 2)
        pixels = nn.functional.pad(pixels, (0, 0, 3, 3, 3, 3))  # transparent, between the pictures
        return pixels.transpose(0, 1).flatten(1, 2)

    top = strip(images[:, 0], "gray")
    picture = ipywidgets.Image(width=top.shape[1])
    text = ipywidgets.HTML()
    places = dict(zip(maps, LAYER_NAMES, strict=False))
    names = [(f"{places[layer]}, filter {k}", (layer, k)) for layer, k in words]
    slider = ipywidgets.SelectionSlider(options=names, description="look at")
    slider.layout.width = "90%"

    def show(_=None) -> None:
        layer, k = slider.value
        bright = (maps[layer][k] / maps[layer].max()).sqrt()
        file = io.BytesIO()
        Image.fromarray(torch.cat([top, strip(bright, "magma")]).numpy()).save(file, "PNG")
        picture.value, text.value = file.getvalue(), words[layer, k]

    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([slider, picture, text])
