"""What a network costs: parameters, multiply-adds, milliseconds."""

import copy
import random
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnn_pruning.training import training_flags


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases of ``model``."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_shape: tuple[int, int, int] = (1, 28, 28)) -> int:
    """Return the multiply-adds of one forward pass over one image; biases are not counted."""
    with FlopCounterMode(display=False) as counter, training_flags(model), torch.no_grad():
        model.eval()(_images(model, 1, image_shape))
    return counter.get_total_flops() // 2


def latency(
    *models: nn.Module,
    batch_size: int,
    repeats: int = 30,
    image_shape: tuple[int, int, int] = (1, 28, 28),
) -> list[tuple[float, float, float]]:
    """Return the median and the quartiles of the milliseconds that a forward pass takes.

    For each model (median, first quartile, third quartile) over ``repeats`` passes of
    ``batch_size`` random images, after five that are not counted. Measured are copies in
    evaluation mode with their convolutions laid out channels last, as ``fit`` leaves them: other
    layouts take other times. They take turns in random order, so that what else the machine does,
    and what the pass before left in the memory, slows all of them alike.

    On Linux, large batches are measured reliably only if the C library keeps their buffers from
    pass to pass: set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to 1000000000 beforehand.
    """
    images = [_images(model, batch_size, image_shape) for model in models]
    networks = [copy.deepcopy(m).eval().to(memory_format=torch.channels_last) for m in models]
    times: list[list[float]] = [[] for _ in models]
    turns = list(zip(networks, images, times, strict=True))
    shuffle = random.Random(0).shuffle
    with torch.no_grad():
        for _ in range(5 + repeats):
            shuffle(turns)
            for network, batch, row in turns:
                start = time.perf_counter()
                network(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize(batch.device)
                row.append(1000 * (time.perf_counter() - start))
    quartiles = [statistics.quantiles(row[5:], n=4) for row in times]
    return [(median, first, third) for first, median, third in quartiles]


def _images(model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
    parameter = next(model.parameters())
    own = torch.Generator().manual_seed(0)  # the caller's random numbers stay untouched
    return torch.rand(batch_size, *image_shape, generator=own).to(parameter)


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
