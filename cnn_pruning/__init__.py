"""Filter pruning by the Taylor-expansion criterion (Molchanov et al., ICLR 2017)."""

import os

# While they wait, OpenMP's threads spin: two programs on the same cores slow each other down five
# times. A short spin ends that and keeps small networks fast (with OMP_WAIT_POLICY=PASSIVE a pass
# over one image takes three times as long). Torch reads this once, when it is loaded: import this
# package before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from cnn_pruning.experiments.data import fashion_mnist
from cnn_pruning.experiments.model import CNN
from cnn_pruning.experiments.training import evaluate, fit
from cnn_pruning.pruner import TaylorPruner, filter_scores, mask_filters, remove_filters
from cnn_pruning.scores import normalize, select_filters

__all__ = [
    "CNN",
    "TaylorPruner",
    "evaluate",
    "fashion_mnist",
    "filter_scores",
    "fit",
    "mask_filters",
    "normalize",
    "remove_filters",
    "select_filters",
]
