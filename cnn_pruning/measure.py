"""What a network costs: parameters, multiply-adds, milliseconds."""

import copy
import ctypes
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

from cnn_pruning.experiments.data import few_images
from cnn_pruning.experiments.model import CNN
from cnn_pruning.feature_maps import scorable
from cnn_pruning.network.checks import integer, positive, shown
from cnn_pruning.network.description import Network
from cnn_pruning.network.passes import Inputs, device_of, evaluation, on_device, outputs_of
from cnn_pruning.network.removal import remove

Shape = tuple[int, ...] | Inputs | None


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights and biases of ``model``."""
    device_of(model)  # raises if it isn't a network
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, image_shape: Shape = None) -> int:
    """Return the multiply-adds of one forward pass over one image; biases are not counted.

    ``image_shape`` is (channels, height, width), or a batch of what the network takes, of which the
    first is used; a ``CNN`` knows its own. Matrix products, convolutions and attention are counted
    by PyTorch; recurrent, bilinear and deformable layers by their weights. Products of a matrix and
    a vector, and functions such as ``bilinear`` and ``cdist``, aren't counted.

    Raises ``ValueError`` if the shape is missing, or if the network can't take such an image.
    """
    images, more = _images(model, 1, image_shape), [0]
    fast = torch.backends.mha.get_fastpath_enabled()  # it would hide the products of attention
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))

        def counted() -> int:
            return counter.get_total_flops() // 2

        def before(*_: object) -> None:
            more[0] += counted()

        def after(layer: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
            more[0] += _by_weights(layer, [*inputs, *named.values()][0], output) - counted()

        for layer in model.modules():
            if isinstance(layer, BY_WEIGHTS):
                stack.callback(layer.register_forward_pre_hook(before).remove)
                stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.no_grad())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        outputs_of(model, images)
    return counted() + more[0]


BY_WEIGHTS = (nn.RNNBase, nn.Bilinear, DeformConv2d)


def _by_weights(layer: nn.Module, x: Tensor | PackedSequence, output: Tensor) -> int:
    if isinstance(layer, nn.RNNBase):
        steps = x.data.numel() // x.data.shape[-1]
        return steps * sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    if isinstance(layer, nn.Bilinear):  # x W, then times y
        return output.numel() * (layer.in1_features + 1) * layer.in2_features
    return output.numel() * layer.weight[0].numel()


def filter_costs(
    model: nn.Module | Network, data: Dataset | Inputs | None = None, linear: bool = False
) -> list[dict[str, object]]:
    """Return a row for each group of filters: what goes together, and what one filter costs.

    ``group`` is its name in ``filter_scores``, ``layers`` those whose channels go with it,
    ``filters`` how many there are and ``channels`` how many channels of the first layer;
    ``parameters`` and ``macs`` are what the network loses with one filter, as it is now. The last
    two change as others go. ``data`` and ``linear`` are as in ``filter_scores``, and so is what is
    left out. A ``CNN`` needs no ``data``.

    Raises ``TypeError`` and ``ValueError`` as ``filter_scores`` and ``count_macs`` do.
    """
    network, rows = scorable(model, data, linear=linear), []
    images = few_images(data)

    def size(network: Network) -> tuple[int, int]:
        return count_parameters(network.model), count_macs(network.model, images)

    whole = size(network)
    for name, group in network.groups.items():
        small = size(remove(network, {name: [0]})) if group.filters > 1 else whole
        rows.append(
            {
                "group": name,
                "layers": [part.name for part in group.side("out")],
                "filters": group.filters,
                "channels": group.channels(),
                "parameters": whole[0] - small[0],
                "macs": whole[1] - small[1],
            }
        )
    return rows


class Budget:
    """At most so many ``filters``, ``macs``, ``parameters`` or ``milliseconds`` (for one image).

    Of MACs and parameters, a number below 1, or 1.0, is a share of what ``network`` has. ``images``
    are what a network takes. Raises ``ValueError`` unless one is named, as a positive number.
    """

    def __init__(self, network: Network, images: Inputs, **named: float | None) -> None:
        named = {name: value for name, value in named.items() if value is not None}
        sizes = {
            "filters": lambda network: sum(network.filters().values()),
            "macs": lambda network: count_macs(network.model, images),
            "parameters": lambda network: count_parameters(network.model),
            "milliseconds": lambda network: latency(
                network.model, batch_size=1, image_shape=images
            )[0][0],
        }
        if len(named) != 1 or not named.keys() <= sizes.keys():
            raise ValueError(
                f"Name one budget, {', '.join(sizes)}, not {' and '.join(named) or 'none'}."
            )
        ((self.name, value),) = named.items()
        self.size = sizes[self.name]
        whole = self.name == "filters"
        self.most = integer(self.name, value, 1) if whole else positive(self.name, value)
        share = self.most < 1 or (self.most == 1 and isinstance(value, float))
        if share and self.name in ("macs", "parameters"):
            self.most *= self.size(network)

    def holds(self, network: Network) -> bool:
        return self.size(network) <= self.most

    def check(self, smallest: Network) -> None:
        """Raise ``ValueError`` if the smallest network that can be reached is too large."""
        if not self.holds(smallest):
            raise ValueError(
                f"The network can't get down to {self.most:,.6g} {self.name}: it keeps at least "
                f"{self.size(smallest):,.6g}, by keep, min_filters, max_share or multiple_of."
            )


def latency(
    *models: nn.Module, batch_size: int, repeats: int = 30, image_shape: Shape = None
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
        turns = list(zip(networks, images, times, strict=True))
        shuffle = random.Random(0).shuffle
        for _ in range(5 + repeats):
            shuffle(turns)
            for network, batch, row in turns:
                start = time.perf_counter()
                outputs_of(network, batch)
                if (device := device_of(network)).type == "cuda":
                    torch.cuda.synchronize(device)
                row.append(1000 * (time.perf_counter() - start))
    quartiles = [statistics.quantiles(row[5:], n=4, method="inclusive") for row in times]
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


def _images(model: nn.Module, batch_size: int, image_shape: Shape) -> Inputs:
    if image_shape is None and isinstance(model, CNN):
        image_shape = model.IMAGE_SHAPE
    leaves = tree_leaves(image_shape)
    if leaves and all(isinstance(x, Tensor) and x.dim() for x in leaves):
        batch = tree_map(lambda x: x[:1].expand(batch_size, *x.shape[1:]), image_shape)
        return on_device(batch, device_of(model))
    if not isinstance(image_shape, tuple | list):
        raise ValueError(
            "The size of the network's images must be known: image_shape must be (channels, "
            f"height, width), (3, 32, 32) for example, or images, but it is {shown(image_shape)}."
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
