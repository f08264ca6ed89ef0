"""Make the moving picture of notebook 0: filters leave, and an epoch repairs what is left.

    uv run python notebooks/long_runs/moving_picture.py

takes a minute on two cores and writes notebooks/pictures/five_minutes.gif.
"""

import io
from collections.abc import Mapping, Sequence

from cnn_pruning import (
    evaluate,
    fashion_mnist,
    filter_scores,
    fit,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.measure import count_macs, count_parameters
from cnn_pruning.plots import INK, METHODS, REMOVED, bare_image, headline, subplots

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

try:
    from long_runs import trained
except ImportError:  # run as a program
    import trained

GIF = ROOT / "notebooks" / "pictures" / "five_minutes.gif"
REMOVE = 12
PIECES = 10  # of the epoch
COLUMNS = 8


def frame(
    maps: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]],
    left: Mapping[str, tuple[float, str]],
    title: str,
) -> Figure:
    """One frame: the cards of all filters, and beside them what is left of the network.

    ``maps`` (K, H, W) from 0 to 1 by layer; ``left`` has a share from 0 to 1 and a text for each
    thing that is counted.
    """
    cards = [(layer, k) for layer in maps for k in range(len(maps[layer]))]
    rows = -(-len(cards) // COLUMNS)
    figure, axes = subplots(
        rows, COLUMNS + 1, 8, 2.7, gridspec_kw={"width_ratios": [1] * COLUMNS + [5]}
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, rect=(0, 0, 1, 0.97))
    for axis, (layer, k) in zip(axes[:, :-1].flat, cards, strict=True):
        gone = k in removed[layer]
        bare_image(axis, maps[layer][k], cmap="magma", vmin=0, vmax=1, alpha=0.15 if gone else 1)
        for ys in ((0, 27), (27, 0)) if gone else ():
            axis.plot((0, 27), ys, color=REMOVED, lw=2)
    for axis in axes[:, -1]:
        axis.remove()
    bars = figure.add_subplot(axes[0, 0].get_gridspec()[:, -1])
    colors = [METHODS["taylor"], *[INK] * (len(left) - 1)]
    for y, ((name, (share, words)), color) in enumerate(zip(left.items(), colors, strict=True)):
        bars.barh([y], [1], 0.4, color=INK, alpha=0.12)
        bars.barh([y], [share], 0.4, color=color)
        bars.text(0, y - 0.3, name, va="bottom")
        bars.text(1, y - 0.3, words, va="bottom", ha="right", weight="bold")
    bars.set(xlim=(0, 1), ylim=(len(left) - 0.6, -0.8))
    bars.axis("off")
    headline(figure, title)
    return figure


def picture(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, facecolor="white")
    return Image.open(file).convert("RGB")


def frames() -> tuple[list[Image.Image], list[int]]:
    """All frames, and how many milliseconds each one stays."""
    train, val, _ = fashion_mnist()
    (model,) = trained.networks([0])
    scores = normalize(filter_scores(model, TensorDataset(*train[:5_000])))
    image = val.tensors[0][val.tensors[1] == 9][:1]  # an ankle boot
    with torch.no_grad():
        maps = {f"network.{n}": model.network[: n + 2](image)[0] for n in (0, 2)}
    maps = {layer: (seen / seen.max()).sqrt() for layer, seen in maps.items()}
    whole = count_parameters(model), count_macs(model)
    drawn, stays = [], []

    def draw(network: torch.nn.Module, n: int, accuracy: float, title: str, stay: int) -> None:
        counts = count_parameters(network), count_macs(network)
        left = {"accuracy": (accuracy, f"{accuracy:.1%}")}
        for name, now, all_of_it in zip(
            ("parameters", "multiply-adds"), counts, whole, strict=True
        ):
            left[name] = (now / all_of_it, f"{now:,}")
        drawn.append(picture(frame(maps, select_filters(scores, n), left, title)))
        stays.append(stay)

    for n in range(REMOVE + 1):
        network = remove_filters(model, select_filters(scores, n))
        title = f"{n} of 24 filters removed, the lowest Taylor scores first"
        draw(network, n, evaluate(network, val)[1], title, 1500 if n in (0, REMOVE) else 500)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for piece, part in enumerate(order.chunk(PIECES), start=1):
        (row,) = fit(network, TensorDataset(*train[part]), val, epochs=1, lr=1e-3)
        title = f"Training what is left: {piece / PIECES:.0%} of an epoch"
        draw(network, REMOVE, row["val_accuracy"], title, 3000 if piece == PIECES else 300)
    return drawn, stays


def main() -> None:
    drawn, stays = frames()
    both = Image.new("RGB", (drawn[0].width, 2 * drawn[0].height))
    both.paste(drawn[0])
    both.paste(drawn[-1], (0, drawn[0].height))
    colors = both.quantize(64)  # one palette for all, so that nothing flickers
    few = [each.quantize(palette=colors, dither=Image.Dither.NONE) for each in drawn]
    few[0].save(GIF, save_all=True, append_images=few[1:], duration=stays, loop=0, optimize=True)


if __name__ == "__main__":
    main()
