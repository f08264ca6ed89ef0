"""The command on few images, for torchrun to start; "badly", rank 1 is killed at the scoring."""

import os
import signal
import sys

from stores import SPLITS

import cnn_pruning.__main__ as program

program.fashion_mnist = lambda root: SPLITS
if sys.argv[1] == "badly" and os.environ["RANK"] == "1":
    program.filter_scores = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(program.main(sys.argv[2:]))
