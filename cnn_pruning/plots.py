"""The figures of the notebooks: data in, matplotlib figure out."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn

from cnn_pruning.data import CLASSES

# Okabe and Ito's colors, which color-blind readers can tell apart. A layer has the same everywhere.
LAYERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
REMOVED = "#D55E00"
CONTROL = "#888888"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def _figure(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        squeeze=False,
        layout="constrained",
        dpi=STYLE["figure.dpi"],
        **options,
    )
    for axis in axes.flat:
        axis.spines[["right", "top"]].set_visible(False)
    plt.close(figure)  # the notebook shows what it is given, once
    return figure, axes


def _picture(axis: Axes, values: Tensor, **options) -> None:
    axis.imshow(values, interpolation="nearest", **options)  # sharp, and a smaller file
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, for an ``ipywidgets.Image``."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()


def class_examples(images: Tensor, labels: Tensor, each: int = 6) -> Figure:
    """The first ``each`` images of every class, a row each; images (N, 1, H, W), labels (N,)."""
    figure, axes = _figure(len(CLASSES), each, 0.75 * each + 1.5, 0.75 * len(CLASSES))
    for label, row in enumerate(axes):
        for axis, image in zip(row, images[labels == label], strict=False):
            _picture(axis, image[0], cmap="gray_r")
        row[0].set_ylabel(CLASSES[label], rotation=0, ha="right", va="center")
    figure.suptitle(f"Ten classes: {each} images of each", x=0.01, ha="left", weight="bold")
    return figure


def curves(histories: Mapping[str, Sequence[Mapping]], title: str) -> Figure:
    """Loss and accuracy by epoch; ``histories`` maps a name to the rows of ``fit``.

    A row's ``epoch`` is where it is drawn, so that a later training can start where another ended;
    a row without ``train_loss`` is a network as it was before that training.
    """
    figure, (axes,) = _figure(1, 2, 10, 3.6)
    for color, (name, rows) in zip(LAYERS, histories.items(), strict=False):
        for axis, key, style in (
            (axes[0], "train_loss", "--"),
            (axes[0], "val_loss", "-"),
            (axes[1], "val_accuracy", "-"),
        ):
            scale = 100 if key == "val_accuracy" else 1
            values = [scale * row.get(key, math.nan) for row in rows]
            epochs = [row["epoch"] for row in rows]
            label = f"{name}, {'training' if style == '--' else 'validation'}"
            axis.plot(epochs, values, style, color=color, marker="o", ms=4, label=label)
    axes[0].set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy on validation images")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        if histories:
            axis.legend(fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def confusion(counts: Tensor, title: str) -> Figure:
    """A confusion matrix: ``counts``, int64 (10, 10), of true class by predicted class."""
    figure, ((axis,),) = _figure(1, 1, 6.4, 5.6)
    share = 100 * counts / counts.sum(1, keepdim=True)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for i, j in torch.cartesian_prod(torch.arange(10), torch.arange(10)).tolist():
        if share[i, j] >= 0.5:
            color = "white" if share[i, j] > 50 else "black"
            axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=color, size=8)
    axis.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axis.set_yticks(range(10), CLASSES)
    axis.set(xlabel="predicted", ylabel="true class", title=title)
    return figure


def score_bars(
    scores: Mapping[str, Tensor],
    ylabel: str,
    title: str,
    removed: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """One bar a filter, layer beside layer on one scale; ``removed`` filters are hatched."""
    widths = [len(values) for values in scores.values()]
    figure, (axes,) = _figure(
        1, len(scores), 10, 3.2, sharey=True, gridspec_kw={"width_ratios": widths}
    )
    for axis, color, (layer, values) in zip(axes, LAYERS, scores.items(), strict=False):
        bars = axis.bar(range(len(values)), values.tolist(), color=color)
        for k in (removed or {}).get(layer, []):
            bars[k].set(facecolor="white", edgecolor=REMOVED, hatch="////")
        axis.set(xlabel=f"filter of {layer}", xticks=range(len(values)))
    axes[0].set_ylabel(ylabel)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def filter_cards(
    layer: str,
    kernels: Tensor,
    biases: Tensor,
    images: Tensor,
    maps: Tensor,
    scores: Tensor,
    color: str,
) -> Figure:
    """One row a filter, best score first: its kernel, its feature maps on images, its score.

    ``kernels`` (K, C, 3, 3), ``biases`` (K,), ``images`` (N, 1, H, W), ``maps`` (K, N, H, W),
    ``scores`` (K,). The slices of a kernel stand side by side, from the filter before it that each
    one reads. The brightness of a map is the square root of its values.
    """
    order = scores.argsort(descending=True).tolist()
    slices = kernels.shape[1]
    figure, axes = _figure(
        len(order) + 1,
        len(images) + 2,
        11,
        0.72 * (len(order) + 1) + 0.4,
        gridspec_kw={"width_ratios": [1 if slices == 1 else 4, *[1] * len(images), 2.5]},
    )
    figure.set_dpi(75)  # hundreds of small pictures
    for axis, image in zip(axes[0, 1:], images, strict=False):
        _picture(axis, image[0], cmap="gray_r")
    for axis in (axes[0, 0], axes[0, -1]):
        axis.axis("off")
    axes[0, 0].set_title("kernel", size=9, loc="center", y=0)
    axes[0, -1].set_title("score", size=9, y=0)
    limit = kernels.abs().max()
    brightness = PowerNorm(0.5, vmin=0, vmax=maps.max().item())  # dim maps have shapes too
    for row, k in zip(axes[1:], order, strict=True):
        gap = torch.full((kernels.shape[2], 1), float("nan"))
        strip = torch.cat([part for s in kernels[k] for part in (s, gap)][:-1], dim=1)
        _picture(row[0], strip, cmap="RdBu_r", vmin=-limit, vmax=limit)
        label = f"{k}   bias {biases[k]:+.2f}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", size=8)
        for axis, values in zip(row[1:], maps[k], strict=False):
            _picture(axis, values, cmap="magma", norm=brightness)
        row[-1].barh([0], [scores[k]], color=color)
        row[-1].set(xlim=(0, 1.35 * scores.max()), ylim=(-0.8, 0.8), xticks=[], yticks=[])
        row[-1].text(scores[k] + 0.02 * scores.max(), 0, f"{scores[k]:.1e}", va="center", size=8)
        row[-1].spines["bottom"].set_visible(False)
    figure.suptitle(
        f"The filters of {layer}, highest score first", x=0.01, ha="left", weight="bold"
    )
    return figure


def class_scores(scores: Mapping[str, Tensor], title: str) -> Figure:
    """Scores by class, (10, K) for each layer, as shares of each class's sum over all filters."""
    widths = [values.shape[1] for values in scores.values()]
    total = sum(values.sum(1, keepdim=True) for values in scores.values())
    shares = {layer: 100 * values / total for layer, values in scores.items()}
    top = max(values.max() for values in shares.values())
    figure, (axes,) = _figure(1, len(scores), 10, 3.8, gridspec_kw={"width_ratios": widths})
    for axis, (layer, values) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        axis.set(xlabel=f"filter of {layer}", xticks=range(values.shape[1]), yticks=[])
    axes[0].set_yticks(range(10), CLASSES)
    figure.colorbar(image, ax=axes, label="share of the class's scores (%)", pad=0.01)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def estimate_against_truth(
    estimate: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    xlabel: str,
    ylabel: str,
    title: str,
) -> Figure:
    """One numbered point a filter, colored by layer, on logarithmic axes.

    Dead filters, with a zero, can't be drawn on these and are counted in the legend.
    """
    figure, ((axis,),) = _figure(1, 1, 7.4, 5)
    for color, layer in zip(LAYERS, estimate, strict=False):
        x, y = estimate[layer], truth[layer]
        drawn = ((x > 0) & (y > 0)).nonzero().flatten().tolist()
        zeros = f" ({len(x) - len(drawn)} dead, not drawn)" if len(drawn) < len(x) else ""
        axis.scatter(x[drawn], y[drawn], s=36, color=color, label=layer + zeros)
        for k in drawn:
            place = (x[k].item(), y[k].item())
            axis.annotate(k, place, (4, 3), textcoords="offset points", color=color, size=8)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log", yscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.legend()
    return figure


def accuracy_by_removed(
    counts: Sequence[int], methods: Mapping[str, Tensor], title: str, mark: int | None = None
) -> Figure:
    """Accuracy (%) against the number of removed filters; each method (draws, counts).

    A method with several draws is drawn as its mean with a band from lowest to highest. ``mark``
    draws a vertical line at that number of filters.
    """
    figure, ((axis,),) = _figure(1, 1, 9, 4)
    colors = (LAYERS[0], CONTROL, *LAYERS[1:])
    for color, (name, accuracy) in zip(colors, methods.items(), strict=False):
        axis.plot(counts, 100 * accuracy.mean(0), marker="o", ms=4, color=color, label=name)
        if len(accuracy) > 1:
            low, high = (100 * accuracy.aminmax(dim=0)[i] for i in (0, 1))
            axis.fill_between(counts, low, high, color=color, alpha=0.2, lw=0)
    if mark is not None:
        axis.axvline(mark, color=REMOVED, lw=1, ls="--")
        axis.text(mark, 2, f" {mark} filters", color=REMOVED)
    axis.axhline(10, color="black", lw=0.5, ls=":")
    axis.text(0, 11, "guessing", size=8)
    axis.set(
        xlabel="filters removed, no fine-tuning",
        ylabel="validation accuracy (%)",
        ylim=(0, 100),
        xticks=counts[::2],
        title=title,
    )
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    return figure


def what_leaves(model: nn.Sequential, removed: Mapping[str, Sequence[int]]) -> Figure:
    """Every weight and bias of a conv-conv-linear chain as one cell; those that leave are colored.

    A convolution's row is a filter and its column an input channel; for the linear layer, which is
    drawn by blocks, a row is a class and a column the block of inputs that one filter feeds.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    figure, (axes,) = _figure(1, len(layers), 11, 4.2, gridspec_kw={"width_ratios": [1, 2, 3]})
    before: tuple[int, list[int]] = (1, [])
    for axis, (name, layer) in zip(axes, layers, strict=True):
        rows, gone = layer.weight.shape[0], sorted(removed.get(name, []))
        columns, gone_before = before
        for i, j in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).tolist():
            as_filter, as_input = i in gone, j in gone_before
            color = REMOVED if as_filter else "#F0B799" if as_input else "#D9D9D9"
            axis.add_patch(Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, color=color, lw=0))
        bias = columns + 0.5  # apart from the weights
        for i in range(rows):
            color = REMOVED if i in gone else "#D9D9D9"
            axis.add_patch(Rectangle((bias - 0.45, i - 0.45), 0.9, 0.9, color=color, lw=0))
        each = layer.weight.numel() // (rows * columns)
        stay = (rows - len(gone)) * (columns - len(gone_before)) * each + rows - len(gone)
        total = layer.weight.numel() + rows
        linear = isinstance(layer, nn.Linear)
        axis.set(
            xlim=(-0.7, bias + 0.7),
            ylim=(rows - 0.3, -0.7),
            yticks=range(rows),
            xlabel=f"{'block of' if linear else 'input channel,'} {each} weights each",
            ylabel="class" if linear else "filter",
            title=f"{name}: {total:,} → {stay:,}",
        )
        axis.set_xticks([*range(columns), bias], [*range(columns), "bias"])
        axis.tick_params(labelsize=7, length=0)
        before = (rows, gone)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (REMOVED, "#F0B799", "#D9D9D9")]
    names = ("removed filter", "what the next layer had for it", "stays")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    title = "A filter takes along its weights, its bias, and what the next layer had for it"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def overview(
    image: Tensor, maps: Mapping[str, Tensor], scores: Mapping[str, Tensor], removed: Mapping
) -> Figure:
    """The README's picture: every filter's feature map on ``image`` above its score.

    ``image`` (H, W); ``maps`` (K, H, W) and normalized ``scores`` (K,) for each layer, whose bars
    have one scale. The filters of each layer stand in the order of their scores; those in
    ``removed`` are crossed out.
    """
    widest = max(len(values) for values in scores.values())
    figure, axes = _figure(
        2 * len(scores),
        widest + 1,
        12,
        1.75 * len(scores),
        gridspec_kw={"width_ratios": [1.6, *[1] * widest], "height_ratios": [2, 1] * len(scores)},
    )
    highest = max(values.max() for values in scores.values())
    for axis in axes.flat:
        axis.axis("off")
    _picture(axes[0, 0], image, cmap="gray_r")
    for row, (color, (layer, values)) in enumerate(zip(LAYERS, scores.items(), strict=False)):
        top, bottom = axes[2 * row], axes[2 * row + 1]
        bottom[0].text(0, 0.5, f"{layer}\nnormalized score", color=color, weight="bold", size=9)
        brightness = PowerNorm(0.5, vmin=0, vmax=maps[layer].max().item())
        order = values.argsort(descending=True).tolist()
        for column, k in enumerate(order, start=1):
            gone = k in removed.get(layer, [])
            top[column].imshow(maps[layer][k], cmap="magma", norm=brightness)
            bottom[column].bar([0], [values[k]], color="white" if gone else color, width=0.6)
            bottom[column].set(xlim=(-0.5, 0.5), ylim=(0, highest))
            if gone:
                bottom[column].patches[0].set(edgecolor=REMOVED, hatch="////", lw=1)
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    top[column].plot((0, end), ys, color=REMOVED, lw=2.5)
    return figure
