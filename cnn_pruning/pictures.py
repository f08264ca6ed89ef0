"""Make the README's pictures: ``python -m cnn_pruning.pictures``."""

import base64
import json

import torch

from cnn_pruning import TaylorPruner, fashion_mnist, tracking
from cnn_pruning.criteria import normalize
from cnn_pruning.paths import ROOT
from cnn_pruning.plots import overview

NOTEBOOKS = ROOT / "notebooks"
# From a notebook's stored outputs: of its cell that has these words, the figure.
COPIED = {
    "criteria.png": ("06_criteria_compared.ipynb", "Gray: chance."),
    "schedules.png": ("07_iterative_pruning.ipynb", "One schedule, seven ways to choose"),
    "subsets.png": ("08_exact_optimum.ipynb", "Taylor picks from the good end"),
}


def figure_of(notebook: str, words: str) -> bytes:
    """The PNG that is stored with the cell of ``notebook`` whose source has these words."""
    cells = json.loads((NOTEBOOKS / notebook).read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if words in "".join(cell["source"]))
    (png,) = (o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {}))
    return base64.b64decode(png)


def draw_overview() -> None:
    train, val, test = fashion_mnist()
    model, _ = tracking.baseline(
        train, val, test, channels=(8, 16), seed=1, epochs=5, batch_size=128, lr=3e-3
    )
    pruner = TaylorPruner(model)
    scores = normalize(pruner.score(train))
    image = val.tensors[0][val.tensors[1] == 9][:1]  # an ankle boot
    with torch.no_grad():
        maps = {"network.0": model.network[:2](image)[0], "network.2": model.network[:4](image)[0]}
    figure = overview(image[0, 0], maps, scores, pruner.select(7))
    figure.savefig(NOTEBOOKS / "overview.png", dpi=110)


if __name__ == "__main__":
    for file, place in COPIED.items():
        (NOTEBOOKS / file).write_bytes(figure_of(*place))
    draw_overview()
