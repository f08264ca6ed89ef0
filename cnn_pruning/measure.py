"""What a network costs: parameters, multiply-adds, milliseconds."""

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
    model: nn.Module,
    batch_size: int,
    repeats: int = 30,
    image_shape: tuple[int, int, int] = (1, 28, 28),
) -> tuple[float, float, float]:
    """Return the median and the quartiles of the milliseconds that a forward pass takes.

    (median, first quartile, third quartile) over ``repeats`` passes of ``batch_size`` random
    images, after five that are not counted.
    """
    images = _images(model, batch_size, image_shape)
    times = []
    with training_flags(model), torch.no_grad():
        model.eval()
        for _ in range(5 + repeats):
            start = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times.append(1000 * (time.perf_counter() - start))
    first, median, third = statistics.quantiles(times[5:], n=4)
    return median, first, third


def _images(model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
    parameter = next(model.parameters())
    return torch.rand(batch_size, *image_shape, device=parameter.device, dtype=parameter.dtype)


def costs(model: nn.Module) -> dict[str, int | float]:
    """Return filters, parameters, MACs, and the median milliseconds for 1 and for 512 images."""
    return {
        "filters": sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)),
        "parameters": count_parameters(model),
        "MACs": count_macs(model),
        "ms, batch 1": latency(model, 1)[0],
        "ms, batch 512": latency(model, 512)[0],
    }
