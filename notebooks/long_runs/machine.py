"""Where the long runs compute, and networks that are trained once and kept."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(splits: Sequence[TensorDataset]) -> list[TensorDataset]:
    """The same images and labels on ``DEVICE``, so that no mini-batch has to travel.

    A GPU computes in full precision from here on, so that its results are a CPU's but for rounding.
    """
    torch.backends.cudnn.allow_tf32 = False
    return [TensorDataset(*(x.to(DEVICE) for x in data.tensors)) for data in splits]


def trained_once(
    path: Path, untrained: nn.Module, train: Callable[[nn.Module], object]
) -> nn.Module:
    """Return ``untrained`` on ``DEVICE``, with the weights in ``path``.

    If there are none, ``train`` is called with it, and its weights are kept there.
    """
    network = untrained.to(DEVICE)
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True, map_location=DEVICE))
        return network
    train(network)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save({name: value.cpu() for name, value in network.state_dict().items()}, part)
    os.replace(part, path)
    return network
