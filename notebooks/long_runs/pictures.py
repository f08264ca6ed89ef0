"""Make the README's pictures.

    uv run python notebooks/long_runs/pictures.py

copies each figure whose cell has the tag picture-NAME, as its notebook shows it, to
notebooks/pictures/NAME.png, and draws overview.png. Each has a twin for a dark page, NAME_dark.png.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from math import ceil

from cnn_pruning import (
    fashion_mnist,
    filter_scores,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.measure import count_parameters
from cnn_pruning.plots import (
    LAYER_NAMES,
    LAYERS,
    REMOVED,
    bare_image,
    headline,
    png,
    subplots,
    use_style,
)
from long_runs import trained

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image, ImageCms, ImageDraw
from torch import Tensor
from torch.utils.data import TensorDataset

NOTEBOOKS = ROOT / "notebooks"
PICTURES = NOTEBOOKS / "pictures"
TAG = "picture-"


def tagged() -> dict[str, bytes]:
    """The PNG that each tagged cell of the notebooks shows, by name.

    Raises ``ValueError`` for a tag on two cells, or on one without exactly one figure.
    """
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for tag in cell["metadata"].get("tags", []):
                if tag.startswith(TAG):
                    name = tag.removeprefix(TAG)
                    pages = [o.get("data", {}).get("text/html", "") for o in cell["outputs"]]
                    shown = "".join("".join(page) for page in pages)
                    figures = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
                    if name in found or len(figures) != 1:
                        raise ValueError(
                            f"{path.name}: the tag {tag} must be on one cell, with one figure."
                        )
                    found[name] = base64.b64decode(figures[0])
    return found


def darkened(picture: bytes, photos: Sequence[tuple[int, int, int, int]] = ()) -> bytes:
    """The same PNG for a dark page: what was light is dark, and each color keeps its hue.

    The rectangles of ``photos`` (left, top, right, bottom), in pixels, stay as they are.
    """
    light = Image.open(io.BytesIO(picture)).convert("RGB")
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    there = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    back = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    lightness, *hue = ImageCms.applyTransform(light, there).split()
    turned = lightness.point(lambda value: 255 * (1 - 0.94 * (value / 255) ** 1.5))
    dark = ImageCms.applyTransform(Image.merge("LAB", (turned, *hue)), back)
    for box in photos:
        dark.paste(light.crop(box), box)
        # their edges are half page, half picture
        ImageDraw.Draw(dark).rectangle(box, outline=dark.getpixel((0, 0)), width=2)
    file = io.BytesIO()
    few = dark.quantize(256, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True, icc_profile=None)  # which would hold the time
    return file.getvalue()


def overview(
    image: Tensor,
    maps: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    removed: Mapping[str, Sequence[int]],
    outcome: str,
) -> Figure:
    """The README's first picture: what each filter sees in ``image``, above its score.

    ``image`` (H, W); ``maps`` (K, H, W) and normalized ``scores`` (K,) for each layer, whose bars
    have one scale. The filters of a layer stand in the order of their scores; those in
    ``removed`` are crossed out. ``outcome`` stands beside the first layer.
    """
    widest = max(map(len, scores.values()))
    heights = [0.55, 1, 0.8] * len(scores)
    figure, axes = subplots(len(heights), widest, 10, 3.6, height_ratios=heights)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.015, rect=(0.005, 0.01, 0.99, 0.98))
    for axis in axes.flat:
        axis.axis("off")
    highest = max(values.max().item() for values in scores.values())
    place = figure.add_subplot(axes[0, 0].get_gridspec()[0:3, 0:3])
    bare_image(place, image, cmap="gray_r")
    for i, (layer, values) in enumerate(scores.items()):
        names, seen, bars = axes[3 * i : 3 * i + 3, 0 if i else 4 :]
        words = f"{LAYER_NAMES[i].capitalize()}: what each filter sees, and its score"
        _write(names[0], words, color=LAYERS[i], weight="bold")
        brightness = PowerNorm(0.5, vmin=0, vmax=maps[layer].max().item())
        for column, k in enumerate(values.argsort(descending=True).tolist()):
            gone = k in removed.get(layer, [])
            bare_image(seen[column], maps[layer][k], cmap="magma", norm=brightness)
            look = {"fc": "none", "ec": REMOVED, "hatch": "////"} if gone else {"fc": LAYERS[i]}
            bars[column].bar([0], [values[k]], width=0.4, **look)
            bars[column].set(xlim=(-0.5, 0.5), ylim=(0, highest))
            if gone:
                end = maps[layer].shape[1] - 1
                for ys in ((0, end), (end, 0)):
                    seen[column].plot((0, end), ys, color=REMOVED, lw=3)
    before, gone = (sum(map(len, each.values())) for each in (scores, removed))
    _write(axes[1, -4], f"{before} filters\n→ {before - gone}", 0.2, linespacing=1.5)
    _write(axes[2, -4], outcome, 0.2, linespacing=1.5)
    headline(figure, f"Every filter gets a score; the {gone} lowest leave the network")
    return figure


def _write(axis: Axes, words: str, left: float = 0, **look) -> None:
    """Words that reach over several columns."""
    written = axis.text(left, 0.5, words, transform=axis.transAxes, size=13, va="center", **look)
    written.set_in_layout(False)


def draw_overview() -> None:
    use_style()
    train, val, _ = fashion_mnist()
    (model,) = trained.networks([1])
    scores = normalize(filter_scores(model, TensorDataset(*train[:5_000])))
    removed = select_filters(scores, 7)
    before, after = map(count_parameters, (model, remove_filters(model, removed)))
    image = val.tensors[0][val.tensors[1] == 9][:1]  # an ankle boot
    with torch.no_grad():
        maps = {"network.0": model.network[:2](image)[0], "network.2": model.network[:4](image)[0]}
    outcome = f"{before:,} parameters\n→ {after:,}"
    figure = overview(image[0, 0], maps, scores, removed, outcome)
    keep("overview", png(figure), photos(figure))


def photos(figure: Figure) -> list[tuple[int, int, int, int]]:
    """Where the colored images of a figure are in its ``png``: left, top, right, bottom."""
    figure.draw_without_rendering()
    height, found = 2 * figure.bbox.height, []
    for axis in figure.axes:
        if any(image.get_cmap().name == "magma" for image in axis.images):
            (left, bottom), (right, top) = 2 * axis.get_window_extent().get_points()
            found.append((int(left), int(height - top), ceil(right), ceil(height - bottom)))
    return found


def keep(name: str, picture: bytes, photos: Sequence[tuple[int, int, int, int]] = ()) -> None:
    (PICTURES / f"{name}.png").write_bytes(picture)
    (PICTURES / f"{name}_dark.png").write_bytes(darkened(picture, photos))


def main() -> None:
    for name, picture in tagged().items():
        keep(name, picture)
    draw_overview()


if __name__ == "__main__":
    main()
