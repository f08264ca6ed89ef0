"""Filter pruning by the Taylor-expansion criterion (Molchanov et al., ICLR 2017)."""

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
