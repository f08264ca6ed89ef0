"""FashionMNIST as tensors, split into train, validation and test; mini-batches."""

import gzip
import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    default_collate,
)
from torchvision.datasets import FashionMNIST

from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.experiments.ranks import Shared, agree, of_all, own, together
from cnn_pruning.network.checks import integer, shown
from cnn_pruning.network.passes import Inputs

CLASSES = tuple(FashionMNIST.classes)
VALIDATION_SIZE = 5_000


def fashion_mnist(
    root: str | Path | None = None,
) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return FashionMNIST as (train, validation, test), 55,000 / 5,000 / 10,000 examples.

    Each is a ``TensorDataset`` of images, float32 (N, 1, 28, 28) in [0, 1], and labels,
    int64 (N,). The validation images are taken out of the original training images by a fixed
    stratified draw: 500 of each class, the same ones on every call.

    The archives are read where torchvision has them, in ``root/FashionMNIST/raw`` (by default in
    the repository's ``data`` folder), and checked against their MD5 sums. Nothing is extracted.
    Archives that are missing are downloaded.

    Raises ``ValueError`` if an archive is damaged, ``ConnectionError`` if one is missing and
    can't be downloaded, ``OSError`` if the folder can't be written to.

    Source: Xiao, Rasul, Vollgraf, *Fashion-MNIST* (2017), arXiv 1708.07747.
    """
    try:
        folder = ROOT / "data" if root is None else Path(root).expanduser()
        folder.resolve()  # fails for what can't be a path
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"root must be a folder, but it is {shown(root)} ({error}).") from error
    images, labels = _read(folder, "train")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    per_class = VALIDATION_SIZE // len(CLASSES)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        held_out[shuffled[labels[shuffled] == label][:per_class]] = True
    return (
        TensorDataset(images[~held_out], labels[~held_out]),
        TensorDataset(images[held_out], labels[held_out]),
        TensorDataset(*_read(folder, "t10k")),
    )


def _read(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a part, behind the headers of their files."""
    raw = root / "FashionMNIST" / "raw"
    pixels = _unpacked(raw / f"{part}-images-idx3-ubyte.gz")[16:]
    labels = _unpacked(raw / f"{part}-labels-idx1-ubyte.gz")[8:]
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28) / 255
    return images, torch.frombuffer(labels, dtype=torch.uint8).long()


def _unpacked(archive: Path) -> bytearray:
    packed = archive.read_bytes() if archive.exists() else _downloaded(archive)
    expected, found = dict(FashionMNIST.resources)[archive.name], hashlib.md5(packed).hexdigest()
    if found != expected:
        raise ValueError(
            f"{archive} is damaged (its MD5 sum is {found}, not {expected}): restore it with "
            "`git checkout`, or delete it to have it downloaded."
        )
    return bytearray(gzip.decompress(packed))


def _downloaded(archive: Path) -> bytes:
    """Download an archive to its place, whole or not at all, and return it."""
    raw = archive.parent
    new = [each for each in (raw, *raw.parents) if not each.exists()]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=raw):  # before the download, if it can't be written
            with urlopen(FashionMNIST.mirrors[0] + archive.name, timeout=60) as answer:
                packed = answer.read()
        with tempfile.TemporaryDirectory(dir=raw) as folder:
            half = Path(folder) / archive.name
            half.write_bytes(packed)
            half.replace(archive)
        return packed
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{archive.name} is not in {raw} and could not be downloaded "
            f"({' '.join(str(error).split())}): put the four .gz archives there."
        ) from error
    except OSError as error:
        raise OSError(
            f"{archive.name} could not be downloaded into {raw} ({error}): make that folder "
            "writable, or name another one with fashion_mnist(root=...)."
        ) from error
    finally:
        with suppress(OSError):  # only what is new and empty goes
            for each in new:
                each.rmdir()


def batches(
    dataset: Dataset, batch_size: int, generator: torch.Generator | None = None
) -> DataLoader:
    """Return a loader of (images, labels) mini-batches, shuffled if a ``generator`` is given.

    ``dataset`` is any dataset of (image, label) with a length, or of ((image, vector), label) for a
    network of several inputs; a ``TensorDataset`` is fetched a whole batch at a time, which is much
    faster. The last batch may be smaller. For a ``Shared`` one the loader has what this rank reads:
    in training, at least one image of each mini-batch.

    Raises ``TypeError`` for what isn't such a dataset, at once or at its first item, and
    ``ValueError`` for an empty one, a ``batch_size`` that isn't a positive integer, or another one
    on another rank, or training on parts that are only pooled.
    """
    batch_size = integer("batch_size", batch_size, 1)
    shared = dataset if isinstance(dataset, Shared) else None
    dataset = own(dataset)
    try:
        size = len(dataset) if hasattr(dataset, "__getitem__") else None
    except (TypeError, ValueError, IndexError):
        size = None
    if size is None or isinstance(dataset, Mapping | IterableDataset):
        hint = ": hand in its .dataset" if isinstance(dataset, DataLoader) else ""
        raise TypeError(
            "The data must be a dataset of (image, label) with a length, a TensorDataset for "
            f"example, but they are a {type(dataset).__name__}{hint}."
        )
    if (len(shared) if shared else size) == 0:
        raise ValueError("The dataset is empty: give at least one (image, label).")
    agree(shared, batch_size=batch_size, seed=generator and generator.initial_seed())
    if generator and shared and not shared.whole:
        raise ValueError("To train, every rank needs all of the data: use divide, not pool.")
    order = RandomSampler(dataset, generator=generator) if generator else range(len(dataset))
    sampler = _Part(order, batch_size, shared.part if shared else slice(None), bool(generator))
    # Without a generator of its own, a DataLoader draws from the caller's random numbers.
    private = torch.Generator()
    if type(dataset) is TensorDataset:  # a subclass may change the images one by one
        if len(dataset):
            _check_item(tuple(tensor[0] for tensor in dataset.tensors))
        return DataLoader(dataset, sampler=sampler, batch_size=None, generator=private)
    return DataLoader(dataset, batch_sampler=sampler, generator=private, collate_fn=_collate)


class _Part(BatchSampler):
    """What one rank takes of each mini-batch.

    To train, every rank takes part in every mini-batch: where there are fewer images than ranks,
    the first one stands in.
    """

    def __init__(self, order: Iterable[int], batch_size: int, part: slice, training: bool) -> None:
        super().__init__(order, batch_size, drop_last=False)
        self.part, self.training = part, training

    def __iter__(self) -> Iterator[list[int]]:
        for indices in super().__iter__():
            part = indices[self.part]
            if part or self.training:
                yield part or indices[:1]


def epoch(
    loader: DataLoader, dataset: Dataset, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield the mini-batches of ``loader``, and by what to divide the sum of each one's loss.

    That is its number of images. Where ranks train together, DistributedDataParallel averages over
    them, so it is the number for one rank if all had equally many; and infinity for an image that
    only stands in.
    """
    rank, ranks = (dataset.rank, dataset.ranks) if isinstance(dataset, Shared) else (0, 1)
    left = len(dataset)
    for images, labels in loader:
        size = min(batch_size, left)
        left -= size
        yield images, labels, size / ranks if rank < size else math.inf


def few_images(data: Dataset | Inputs | None, count: int = 2) -> Inputs | None:
    """Return the first images of a dataset, or of a batch of images; None if there are no data.

    Where several ranks share the data, they all get the first images of one of them. Raises as
    ``batches`` does.
    """
    if data is None:
        return None
    if isinstance(data, Tensor) and data.dim() > 1:
        return data[:count]
    if isinstance(data, tuple | list) and data and all(isinstance(x, Tensor) for x in data):
        return [x[:count] for x in data]
    elsewhere = isinstance(data, Shared) and len(data) and not len(data.data)
    with together(data):
        images = None if elsewhere else next(iter(batches(own(data), count)))[0]
    return next(x for x in of_all(data, images) if x is not None)


def _collate(items: list) -> list:
    for item in items:
        _check_item(item)
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"The items of the data don't make a batch ({str(error).splitlines()[0]}): the images "
            "must have one shape, and the labels be integers or tensors of one shape."
        ) from error


def _check_item(item: object) -> None:
    """Raise ``TypeError`` unless ``item`` is (image, label), with the image as a tensor."""
    found = f"a {type(item).__name__}"
    if isinstance(item, tuple | list):
        if len(item) == 2 and not isinstance(item[1], str | bytes):
            inputs = item[0] if isinstance(item[0], tuple | list) else [item[0]]
            if inputs and all(hasattr(x, "dtype") for x in inputs):
                return
        found = f"({', '.join(type(part).__name__ for part in item)})"
    raise TypeError(
        "Each item of the data must be (image, label), a tensor and an integer, or "
        f"((image, vector), label) for a network of several inputs, but one is {found}: use "
        "TensorDataset(images, labels), or a transform such as torchvision's ToTensor, and number "
        "the classes."
    )
