"""Filter pruning by the Taylor-expansion criterion (Molchanov et al., ICLR 2017)."""

import os

# Two programs on the same cores slow each other down nearly threefold while OpenMP's threads spin
# as they wait. Torch reads this once, when it is loaded: import this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cnn_pruning.data import fashion_mnist
from cnn_pruning.model import CNN
from cnn_pruning.pruner import TaylorPruner, filter_scores, mask_filters, remove_filters
from cnn_pruning.scores import normalize, select_filters
from cnn_pruning.training import evaluate, fit

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
