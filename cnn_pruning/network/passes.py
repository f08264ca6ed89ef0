"""One pass of a batch through a network: its mode, its device, its loss, its errors."""

import copy
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from cnn_pruning.network.checks import check_function, check_module, first_line, kind_of

Inputs = Tensor | tuple[Tensor, ...] | list[Tensor]
"""What a network takes for N examples: images (N, ...), or several tensors, one argument each."""

Cost = Callable[[object, object], Tensor]
"""(outputs, labels) of a batch to what each of its N examples costs, (N,)."""


class UnreadableError(TypeError):
    """What a network is or does that can't be read or scored, or why some filters can't go."""


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """``model`` is in evaluation mode for the block; all its training flags are restored after."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """What the block draws is always the same, and the caller's random numbers are kept: PyTorch's,
    Python's and numpy's. One thread at a time may be in it.
    """
    with _ONE_THREAD, torch.random.fork_rng():
        states = random.getstate(), numpy.random.get_state()
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


_ONE_THREAD = threading.RLock()


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model``, which can be trained even where gradients are off.

    What its ``forward`` keeps of an earlier pass is copied without its history.

    Raises ``TypeError`` if the network holds something that can't be copied.
    """
    kept = tree_leaves([[*vars(module).values()] for module in model.modules()])
    memo = {id(x): x.detach().clone() for x in kept if isinstance(x, Tensor) and not x.is_leaf}
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise TypeError(
            f"The network can't be copied ({first_line(error)}): take out of it what isn't a "
            "layer or a tensor."
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the parameters of ``model``, to which the data are moved.

    Raises ``TypeError`` if ``model`` isn't an ``nn.Module``, or one without weights yet.
    """
    check_module(model)
    if any(map(is_lazy, model.parameters())):
        raise TypeError("The model has layers without weights yet: run one batch through it first.")
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def size_of(batch: object) -> int:
    """Return how many examples there are in a batch: the length of its first tensor."""
    return next(len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim())


def outputs_of(model: nn.Module, inputs: Inputs) -> object:
    """Return what ``model`` puts out for a batch.

    Raises ``ValueError`` if the network fails on it, with the reason in one sentence.
    """
    try:
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    except (torch.OutOfMemoryError, UnreadableError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if isinstance(model, nn.parallel.DistributedDataParallel):  # other ranks may be the reason
            raise
        kinds = " and ".join(map(kind_of, tree_leaves(inputs)))
        weights = next((str(p.dtype) for p in model.parameters()), "").removeprefix("torch.")
        raise ValueError(
            f"The network can't take a batch of {kinds} images "
            f"({first_line(error)}): check their shape, (N, channels, height, width), and their "
            f"dtype; its weights are {weights}."
        ) from error


def call(name: str, function: Callable, *arguments: object) -> object:
    """Return what a caller's ``function`` returns; where it fails, a ``ValueError`` names it."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} failed on a mini-batch: {first_line(error)}.") from error


@contextmanager
def differentiable(loss: Tensor) -> Iterator[None]:
    """A block that differentiates ``loss``; where PyTorch can't, a ``TypeError`` says so."""
    if not loss.requires_grad:
        raise ValueError("The cost has no gradient: compute it from the outputs.")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "checkpoint" in str(error):
            raise TypeError(
                "The network uses gradient checkpointing, which computes its maps twice: switch "
                "that off while you score."
            ) from error
        raise TypeError(
            f"PyTorch can't differentiate the network ({first_line(error)}): use layers that have "
            "a derivative, and inplace=False behind one that needs what it put out."
        ) from error


def summed_loss(outputs: Tensor, labels: Tensor, cost: Cost | None = None) -> Tensor:
    """Return the cross-entropy (nats), summed over the examples, at least in float32.

    ``outputs`` are logits (N, classes), and ``labels`` are int64 (N,), from 0 to classes - 1. With
    ``cost``, what each example costs is ``cost(outputs, labels)``, (N,), instead.

    Raises ``ValueError`` for other outputs, labels or costs, and for outputs that are
    probabilities, of which the cross-entropy would take the softmax once more.
    """
    if cost is not None:
        check_function("The cost", cost, "outputs", "labels")
        each = call("The cost", cost, outputs, labels)
        count = size_of((labels, outputs))
        if not isinstance(each, Tensor) or each.shape != (count,):
            raise ValueError(
                f"The cost must return a tensor ({count},), one number for each example, but "
                f"it returned {kind_of(each)}."
            )
        return each.sum()
    check_labels(outputs, labels)
    rounding = max(1e-5, 2 * torch.finfo(outputs.dtype).eps)
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if outputs.shape[1] > 1 and outputs.detach().amin() >= 0:
        if (outputs.detach().sum(1) - 1).abs().max() < rounding:
            raise ValueError(
                "The network's outputs are probabilities (each row sums to 1), but cross-entropy "
                "takes logits: leave out the softmax at the end, or use nn.LogSoftmax."
            )
    return cross_entropy(outputs, labels, reduction="sum")


def check_labels(outputs: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless there are logits (N, classes) and a label for each example."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or not outputs.is_floating_point():
        raise ValueError(
            "The network must return logits, a floating-point tensor (N, classes), but it returned "
            f"{kind_of(outputs)}: let it return these alone, with nn.Flatten or nn.Linear at its "
            "end, or give a cost of your own."
        )
    if outputs.shape[1] == 1:
        raise ValueError(
            "The network has one output, of which the cross-entropy is always 0: give a cost, such "
            "as lambda y, labels: binary_cross_entropy_with_logits(y[:, 0], labels.float(), "
            'reduction="none").'
        )
    plain = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not plain or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"The labels must be int64 ({len(outputs)},), but they are {kind_of(labels)}: number "
            "the classes, or give a cost of your own."
        )
    low, high = labels.aminmax()
    if low < 0 or high >= outputs.shape[1]:  # cross_entropy would skip a label of -100
        raise ValueError(
            f"The labels must be from 0 to {outputs.shape[1] - 1}, one for each output of the "
            f"network, but they go from {low} to {high}."
        )


@torch.inference_mode(False)  # where a copy is free of it
def on_device(values: object, device: torch.device) -> object:
    """``values`` with all tensors on ``device``, and free of inference mode."""
    return tree_map_only(
        Tensor, lambda x: (x.clone() if x.is_inference() else x).to(device), values
    )


def pieces(
    loader: Iterable, device: torch.device, most: Callable[[], int] = lambda: 128
) -> Iterator[tuple[Inputs, object]]:
    """Yield the mini-batches of ``loader`` on ``device``; on a CPU, ``most()`` images at a time.

    For passes whose result doesn't depend on the batch. What lies between two layers then stays in
    the cache, and the memory doesn't grow with the batch. Labels with other than tensors in them
    stay whole, for the caller to refuse.
    """
    for images, labels in loader:
        images, labels = on_device((images, labels), device)
        count = size_of(images)
        values = tree_leaves((images, labels))
        whole = device.type != "cpu" or not all(
            isinstance(value, Tensor) and value.dim() and len(value) == count for value in values
        )
        start = 0
        while start < count:
            part = slice(start, count if whole else start + most())
            start = part.stop
            yield (images, labels) if whole else tree_map(lambda x, p=part: x[p], (images, labels))
