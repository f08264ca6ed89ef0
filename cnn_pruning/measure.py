"""What a network costs: parameters, multiply-adds, milliseconds."""

import copy
import random
import statistics
import time

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
    ``batch_size`` random images, after five that are not counted. Measured are copies in
    evaluation mode. They take turns in random order, so that what else the machine does, and what
    the pass before left in the memory, slows all of them alike. ``image_shape`` is as in
    ``count_macs``.

    On Linux, large batches are measured reliably only if the C library keeps their buffers from
    pass to pass: set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to 1000000000 beforehand.
    """
    repeats = integer("repeats", repeats, 2)
    images = [_images(model, batch_size, image_shape) for model in models]
    networks = [copy.deepcopy(model).eval() for model in models]
    times: list[list[float]] = [[] for _ in models]
    for network, batch in zip(networks, images, strict=True):
        with torch.no_grad():
            outputs_of(network, batch)  # raises, if it must, in a sentence
    turns = list(zip(networks, images, times, strict=True))
    shuffle = random.Random(0).shuffle
    with torch.no_grad():
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
