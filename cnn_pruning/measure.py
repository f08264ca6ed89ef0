"""What a network costs: parameters, multiply-adds, milliseconds."""

import copy
import ctypes
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnn_pruning.model import CNN
from cnn_pruning.passes import device_of, evaluation, integer, outputs_of, shown


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases of ``model``."""
    device_of(model)  # raises if it isn't a network
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_shape: tuple[int, ...] | None = None) -> int:
    """Return the multiply-adds of one forward pass over one image; biases are not counted.

    ``image_shape`` is (channels, height, width); a ``CNN`` knows its own. Raises ``ValueError``
    if it is missing, or if the network can't take such an image.
    """
    images = _images(model, 1, image_shape)
    with FlopCounterMode(display=False) as counter, evaluation(model), torch.no_grad():
        outputs_of(model, images)
    return counter.get_total_flops() // 2


def latency(
    *models: nn.Module,
    batch_size: int,
    repeats: int = 30,
    image_shape: tuple[int, ...] | None = None,
) -> list[tuple[float, float, float]]:
    """Return the median and the quartiles of the milliseconds that a forward pass takes.

    For each model (median, first quartile, third quartile) over ``repeats`` passes of
    ``batch_size`` random images, after five that are not counted. Copies are measured, in
    evaluation mode and under ``buffers_kept``. They take turns in random order, so that the
    machine's other work, and what the pass before left in memory, slow all of them alike.
    ``image_shape`` is as in ``count_macs``.
    """
    repeats = integer("repeats", repeats, 2)
    with buffers_kept(), torch.no_grad():
        images = [_images(model, batch_size, image_shape) for model in models]
        networks = [copy.deepcopy(model).eval() for model in models]
        times: list[list[float]] = [[] for _ in models]
        for network, batch in zip(networks, images, strict=True):
            outputs_of(network, batch)  # raises, if it must, in a sentence
        turns = list(zip(networks, images, times, strict=True))
        shuffle = random.Random(0).shuffle
        for _ in range(4 + repeats):  # and one pass before
            shuffle(turns)
            for network, batch, row in turns:
                start = time.perf_counter()
                network(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize(batch.device)
                row.append(1000 * (time.perf_counter() - start))
    quartiles = [statistics.quantiles(row[4:], n=4) for row in times]
    return [(median, first, third) for first, median, third in quartiles]


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Keep freed memory with the process for the block, on Linux with glibc.

    Left alone, glibc gives large buffers back to the system after each pass, or doesn't,
    depending on what was allocated before. If it does, every page of the next pass is faulted in
    again: the same pass takes 16 ms in one process and 40 in another.

    glibc can't say what its thresholds were. Afterwards they are the highest to which it raises
    them by itself, as soon as a program has freed a buffer of 32 MiB, and free memory is given
    back. Thresholds that the environment sets stay as they are. Elsewhere, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if mallopt is None or any(name in os.environ for name in chosen):
        yield
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    mallopt(trim, 1 << 30)
    mallopt(mmap, 1 << 30) or mallopt(mmap, 1 << 25)  # the most that an old glibc takes
    try:
        yield
    finally:
        mallopt(mmap, 1 << 25)
        mallopt(trim, 1 << 26)
        ctypes.CDLL(None).malloc_trim(0)


def _images(model: nn.Module, batch_size: int, image_shape: tuple[int, ...] | None) -> torch.Tensor:
    if image_shape is None and isinstance(model, CNN):
        image_shape = model.IMAGE_SHAPE
    if not isinstance(image_shape, tuple | list):
        raise ValueError(
            "image_shape must be (channels, height, width) of the network's images, (3, 32, 32) "
            f"for example, but it is {shown(image_shape)}."
        )
    sizes = [integer("image_shape", size, 1) for size in image_shape]
    batch_size = integer("batch_size", batch_size, 1)
    device_of(model)  # raises if it isn't a network
    parameter = next(model.parameters(), torch.empty(0))
    own = torch.Generator().manual_seed(0)  # the caller's random numbers stay untouched
    try:
        return torch.rand(batch_size, *sizes, generator=own).to(parameter)
    except RuntimeError as error:
        raise ValueError(f"{batch_size} images of {sizes} don't fit into the memory.") from error


def costs(*models: nn.Module) -> list[dict[str, int | float]]:
    """Return, for each model, filters, parameters, MACs, and the median ms for 1 and 512 images."""
    single = latency(*models, batch_size=1)
    many = latency(*models, batch_size=512, repeats=15)
    return [
        {
            "filters": sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)),
            "parameters": count_parameters(model),
            "MACs": count_macs(model),
            "ms, batch 1": one[0],
            "ms, batch 512": batch[0],
        }
        for model, one, batch in zip(models, single, many, strict=True)
    ]
