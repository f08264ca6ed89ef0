"""Make the README's pictures.

    uv run python notebooks/long_runs/pictures.py

copies each figure whose cell has the tag picture-NAME, as its notebook stores it, to
notebooks/pictures/NAME.png, and draws overview.png.
"""

import base64
import json

from cnn_pruning import (
    fashion_mnist,
    filter_scores,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.baseline import baseline
from cnn_pruning.measure import count_parameters
from cnn_pruning.paths import ROOT
from cnn_pruning.plots import overview, use_style

import torch

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
    outcome = (f"{sizes[0]:,} → {sizes[1]:,} parameters",)
    figure = overview(image[0, 0], maps, scores, removed, outcome)
    figure.savefig(PICTURES / "overview.png", dpi=110)


def main() -> None:
    for name, picture in tagged().items():
        (PICTURES / f"{name}.png").write_bytes(picture)
    draw_overview()


if __name__ == "__main__":
    main()
