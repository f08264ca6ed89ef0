"""Make the README's pictures.

    uv run python notebooks/long_runs/pictures.py

copies each figure whose cell has the tag picture-NAME, as its notebook stores it, to
notebooks/pictures/NAME.png, and draws overview.png.
"""

import base64
import json
from collections.abc import Mapping, Sequence

from cnn_pruning import (
    fashion_mnist,
    filter_scores,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.baseline import baseline
from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.measure import count_parameters
from cnn_pruning.plots import LAYERS, REMOVED, bare_image, headline, subplots, use_style

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

NOTEBOOKS = ROOT / "notebooks"
PICTURES = NOTEBOOKS / "pictures"
TAG = "picture-"


def tagged() -> dict[str, bytes]:
    """The PNG that is stored with each tagged cell of the notebooks, by name.

    Raises ``ValueError`` for a tag on two cells, or on one without exactly one figure.
    """
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for tag in cell["metadata"].get("tags", []):
                if tag.startswith(TAG):
                    name = tag.removeprefix(TAG)
                    stored = [o.get("data", {}) for o in cell.get("outputs", [])]
                    figures = [data["image/png"] for data in stored if "image/png" in data]
                    if name in found or len(figures) != 1:
                        raise ValueError(
                            f"{path.name}: the tag {tag} must be on one cell, with one figure."
                        )
                    found[name] = base64.b64decode(figures[0])
    return found


def overview(
    image: Tensor,
    maps: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]],
    outcome: str,
) -> Figure:
    """The README's picture: every filter's feature map on ``image`` above its score.

    ``image`` (H, W); ``maps`` (K, H, W) and normalized ``scores`` (K,) for each layer, whose bars
    have one scale. The filters of each layer stand in the order of their scores; those in
    ``removed`` are crossed out. ``outcome`` stands beside the first layer, below what is left of
    the filters.
    """
    widest = max(len(values) for values in scores.values())
    figure, axes = subplots(
        2 * len(scores),
        widest + 1,
        12,
        2 * len(scores) + 0.4,
        gridspec_kw={"width_ratios": [1.9, *[1] * widest], "height_ratios": [1, 1] * len(scores)},
    )
    figure.get_layout_engine().set(h_pad=0.01, w_pad=0.02)
    highest = max(values.max().item() for values in scores.values())
    for axis in axes.flat:
        axis.axis("off")
    bare_image(axes[0, 0], image, cmap="gray_r")
    for i, (layer, values) in enumerate(scores.items()):
        top, bottom = axes[2 * i], axes[2 * i + 1]
        color, filters = LAYERS[i % len(LAYERS)], len(values)
        words = {"color": color, "weight": "bold", "size": 11, "va": "top"}
        bottom[0].text(0, 1, f"Convolution {i + 1}:\n{filters} filters", **words)
        bottom[0].text(0, 0.42, "above, what each\nsees; here, its score", size=9, va="top")
        brightness = PowerNorm(0.5, vmin=0, vmax=maps[layer].max().item())
        order = values.argsort(descending=True).tolist()
        for column, k in enumerate(order, start=1):
            gone = k in removed.get(layer, [])
            bare_image(top[column], maps[layer][k], cmap="magma", norm=brightness)
            look = {"fc": "none", "ec": REMOVED, "hatch": "////"} if gone else {"fc": color}
            bottom[column].bar([0], [values[k]], width=0.4, **look)
            bottom[column].set(xlim=(-0.5, 0.5), ylim=(0, highest))
            if gone:
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    top[column].plot((0, end), ys, color=REMOVED, lw=2.5)
    before, gone = (sum(map(len, each.values())) for each in (scores, removed))
    lines = f"{before} filters → {before - gone}\n{outcome}"
    beside = axes[0, len(next(iter(scores.values()))) + 2]
    look = {"size": 15, "va": "top", "linespacing": 1.8}
    words = beside.text(0, 1, lines, transform=beside.transAxes, **look)
    words.set_in_layout(False)  # it takes the place of several columns
    headline(figure, f"Every filter gets a score; the {gone} lowest leave the network")
    return figure


def draw_overview() -> None:
    use_style()
    train, val, test = fashion_mnist()
    model, _ = baseline(
        train, val, test, channels=(8, 16), seed=1, epochs=5, batch_size=128, lr=3e-3
    )
    scores = normalize(filter_scores(model, train))
    removed = select_filters(scores, 7)
    sizes = [count_parameters(network) for network in (model, remove_filters(model, removed))]
    image = val.tensors[0][val.tensors[1] == 9][:1]  # an ankle boot
    with torch.no_grad():
        maps = {"network.0": model.network[:2](image)[0], "network.2": model.network[:4](image)[0]}
    outcome = f"{sizes[0]:,} → {sizes[1]:,} parameters"
    figure = overview(image[0, 0], maps, scores, removed, outcome)
    figure.savefig(PICTURES / "overview.png", dpi=110)


def main() -> None:
    for name, picture in tagged().items():
        (PICTURES / f"{name}.png").write_bytes(picture)
    draw_overview()


if __name__ == "__main__":
    main()
