"""The command on few images, for torchrun to start; "badly", rank 1 is killed at the scoring."""

import os
import signal
import sys

import torch
from torch.utils.data import TensorDataset

import cnn_pruning.__main__ as program


def images(size):
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(torch.rand(size, 1, 28, 28, generator=generator), torch.arange(size) % 10)


program.fashion_mnist = lambda root: (images(60), images(30), images(20))
if sys.argv[1] == "badly" and os.environ["RANK"] == "1":
    program.filter_scores = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(program.main(sys.argv[2:]))
