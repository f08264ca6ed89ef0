"""The figures of notebook 3: what filters look like, what they see, and their scores."""

import io
from collections.abc import Mapping

from cnn_pruning.plots import INK, LAYERS, bare_image, headline, subplots

import ipywidgets
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn


def filter_cards(
    layer: str,
    images: Tensor,
    maps: Tensor,
    scores: Tensor,
    color: str,
    kernels: Tensor | None = None,
) -> Figure:
    """One row a filter, best score first: its kernel, its feature maps on images, its score.

    ``images`` (N, 1, H, W), ``maps`` (K, N, H, W), ``scores`` (K,), and ``kernels`` (K, 3, 3) if
    each filter has one slice. The brightness of a map is the square root of its values.
    """
    order = scores.argsort(descending=True).tolist()
    figure, axes = subplots(
        len(order) + 1,
        len(images) + 2,
        10,
        0.66 * (len(order) + 1) + 0.4,
        gridspec_kw={"width_ratios": [1 if kernels is not None else 0.4, *[1] * len(images), 2.5]},
    )
    for axis, image in zip(axes[0, 1:], images, strict=False):
        bare_image(axis, image[0], cmap="gray")
    for axis in (axes[0, 0], axes[0, -1]):
        axis.axis("off")
    axes[0, 0].set_title("filter" if kernels is None else "kernel", size=10, loc="center", y=0)
    axes[0, -1].set_title("score", size=10, y=0)
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
        row[-1].set(xlim=(0, 1.5 * scores.max()), ylim=(-0.8, 0.8), xticks=[], yticks=[])
        row[-1].text(scores[k] + 0.03 * scores.max(), 0, f"{scores[k]:.1e}", va="center", size=9)
        row[-1].spines["bottom"].set_visible(False)
    headline(figure, f"What the filters of {layer} see, highest score first")
    return figure


def kernel_sheet(layer: str, kernels: Tensor, scores: Tensor) -> Figure:
    """All slices of a convolution's ``kernels`` (K, C, 3, 3), a column for each filter.

    The filters stand in the order of their ``scores`` (K,), the highest first.
    """
    order = scores.argsort(descending=True).tolist()
    filters, slices = kernels.shape[:2]
    figure, ((axis,),) = subplots(1, 1, 10, 0.58 * slices + 0.9)
    limit = kernels.abs().max().item()
    for column, k in enumerate(order):
        for row, values in enumerate(kernels[k]):
            extent = (column - 0.42, column + 0.42, row + 0.42, row - 0.42)
            axis.imshow(signed(values, limit), extent=extent, interpolation="nearest")
            corner = (column - 0.42, row - 0.42)
            axis.add_patch(Rectangle(corner, 0.84, 0.84, fc="none", ec=INK, lw=0.4))
    axis.set(xlim=(-0.6, filters - 0.4), ylim=(slices - 0.4, -0.6))
    axis.set(xlabel=f"filter of {layer}, highest score first", ylabel="reads the map of filter")
    axis.set_xticks(range(filters), order)
    axis.set_yticks(range(slices))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    headline(
        figure, f"Each filter of {layer} reads {slices} maps, with one slice of its kernel each"
    )
    return figure


def signed(values: Tensor, limit: float) -> Tensor:
    """Pixels (..., 4) in red where ``values`` are positive and in blue where they are negative.

    The smaller the value, the fainter the pixel. Zero is transparent, because a page may be dark.
    """
    red, blue = torch.tensor([0.84, 0.19, 0.25]), torch.tensor([0.20, 0.50, 0.90])
    colors = torch.where(values[..., None] > 0, red, blue)
    return torch.cat([colors, (values.abs() / limit).clamp(max=1).sqrt()[..., None]], dim=-1)


def two_rankings(
    above: Mapping[str, Tensor], below: Mapping[str, Tensor], names: tuple[str, str], mark: int
) -> Figure:
    """The filters from the lowest score to the highest, in two lists; a line joins each filter.

    ``mark`` separates so many of the lowest from the others.
    """
    figure, ((axis,),) = subplots(1, 1, 10, 2.9)
    colors = [LAYERS[i % len(LAYERS)] for i, values in enumerate(above.values()) for _ in values]
    numbers = [k for values in above.values() for k in range(len(values))]
    ranks = [torch.cat(list(s.values())).argsort(stable=True).argsort() for s in (above, below)]
    for upper, lower, color, number in zip(
        *(r.tolist() for r in ranks), colors, numbers, strict=True
    ):
        axis.plot((upper + 1, lower + 1), (1, 0), color=color, lw=1 if upper == lower else 2.5)
        for x, y in ((upper + 1, 1), (lower + 1, 0)):
            axis.plot([x], [y], "o", ms=17, color=color)
            axis.text(x, y, number, ha="center", va="center", color="white", size=9, weight="bold")
    axis.axvline(mark + 0.5, color=INK, ls="--", lw=1)
    axis.text(mark + 0.4, 1.42, f"the {mark} lowest", ha="right", va="center")
    axis.set(
        xlim=(0.3, len(numbers) + 0.7), ylim=(-0.4, 1.6), xlabel="place (1 is the lowest score)"
    )
    axis.set_yticks((1, 0), names)
    axis.set_xticks([1, *range(5, len(numbers) + 1, 5)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    handles = [axis.plot([], [], "o", color=LAYERS[i])[0] for i in range(len(above))]
    axis.legend(handles, above, loc="upper right", ncols=len(above), bbox_to_anchor=(1, 1.16))
    headline(figure, "Normalizing moves filters of one layer past those of the other")
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
    names = [(f"{layer}, filter {k}", (layer, k)) for layer, k in words]
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
    display(HTML("<i>No slider here? Choose Run, Run All Cells.</i>"))
    return ipywidgets.VBox([slider, picture, text])
