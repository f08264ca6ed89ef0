"""Draw the README's picture: ``python -m cnn_pruning.overview``."""

import torch

from cnn_pruning import TaylorPruner, fashion_mnist, tracking
from cnn_pruning.criteria import normalize
from cnn_pruning.paths import ROOT
from cnn_pruning.plots import overview

if __name__ == "__main__":
    train, val, test = fashion_mnist()
    model, _ = tracking.baseline(
        train, val, test, channels=(8, 16), seed=1, epochs=5, batch_size=128, lr=3e-3
    )
    pruner = TaylorPruner(model)
    scores = pruner.score(train)
    image = val.tensors[0][val.tensors[1] == 9][:1]  # an ankle boot
    with torch.no_grad():
        maps = {"network.0": model.network[:2](image)[0], "network.2": model.network[:4](image)[0]}
    figure = overview(image[0, 0], maps, normalize(scores), pruner.select(7))
    figure.savefig(ROOT / "notebooks" / "overview.png", dpi=110)
