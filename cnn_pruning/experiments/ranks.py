"""Several processes that work together under ``torchrun``: who reads what, and what they share.

Only data that come from ``divide`` or ``pool`` are read together. With other data each process
works alone, in a distributed program too, so that rank 0 may score or evaluate by itself.
"""

import functools
import hashlib
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, TensorDataset

from cnn_pruning.network.checks import first_line
from cnn_pruning.network.passes import same_random_numbers

PATIENCE = 60  # seconds that a rank waits for the others without a word
GIVE_UP = timedelta(minutes=10)  # and that the command waits at all, instead of gloo's 30


class RankLost(ConnectionError):
    """Another rank has stopped without a word, or doesn't do what this one does."""


class Refused(ValueError):
    """What one rank can't do, or has otherwise: all ranks raise it, with the same sentence."""


# What each rank reads


class Shared(Dataset):
    """Data that all ranks of the default process group read together: see ``divide``, ``pool``."""

    def __init__(self, data: Dataset, whole: bool) -> None:
        self.data = data
        self.whole = whole
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.part = slice(self.rank, None, self.ranks) if whole else slice(None)
        """Which examples of a mini-batch of ``data`` this rank takes."""
        found = _of_all("data", (len(data), _examples_digest(data) if whole else b""))
        lengths = [length for length, _ in found]
        if whole and len(set(found)) > 1:
            kind = f"of different lengths, {lengths}" if len(set(lengths)) > 1 else "that differ"
            raise Refused(
                f"The ranks have data {kind}: hand all of the data to every rank, in the same "
                "order, or, where each has a part of its own, use pool."
            )
        self.length = len(data) if whole else sum(lengths)

    def __len__(self) -> int:
        """How many examples all ranks have together."""
        return self.length

    def __getitem__(self, i: int) -> object:
        return self.data[i]


def divide(data: Dataset) -> Dataset:
    """Return ``data``, which every rank has whole, for the ranks to read together.

    Each rank reads its part of every mini-batch, ``batch_size`` being that of all ranks together,
    and what is computed is what one process computes from all of ``data``, to rounding. Hand the
    result to ``filter_scores``, ``evaluate``, ``fit`` or ``prune_iteratively``, on every rank, with
    the same network and the same arguments. All of them return the same.

    Without a process group, or in one of a single rank, ``data`` is returned as it is. The group is
    the default one of ``torch.distributed``.

    Raises ``ValueError`` if the ranks have other data: of other lengths, or with other values, all
    of which are compared in a ``TensorDataset``, and those of three examples otherwise.
    """
    return Shared(data, whole=True) if _several() else data


def pool(part: Dataset) -> Dataset:
    """Return ``part``, of which every rank has its own, for the ranks to read together.

    As ``divide``, but the data are those of all ranks together, and each rank reads its own, in
    mini-batches of ``batch_size``. A part may be empty. Networks can't be trained on it, because
    a mini-batch is drawn from all of the data.
    """
    return Shared(part, whole=False) if _several() else part


def own(data: Dataset) -> Dataset:
    """Return the data as this process has them."""
    return data.data if isinstance(data, Shared) else data


# What the ranks share


def agree(data: Dataset, **settings: object) -> None:
    """Raise ``Refused`` if the ranks that share ``data`` differ in a setting. Of one that is a
    function, name and closure are compared.
    """

    def word(value: object) -> str:
        said = repr(sorted(value) if isinstance(value, set | frozenset) else value)
        if hasattr(value, "__qualname__"):
            closed = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
            said = f"{value.__qualname__} of {closed}" if closed else value.__qualname__
        # Each process has its own addresses, and its own GPU.
        return re.sub("(?<=cuda):[0-9]+|, index=[0-9]+| at 0x[0-9a-f]+", "", said)

    if not isinstance(data, Shared):
        return
    first, *others = _of_all(", ".join(settings), [*map(word, settings.values())])
    for rank, found in enumerate(others, start=1):
        for name, here, there in zip(settings, first, found, strict=True):
            if here != there:
                raise Refused(
                    f"{name} is {here} on rank 0 and {there} on rank {rank}: give all ranks the "
                    "same."
                )


@contextmanager
def together(data: Dataset) -> Iterator[None]:
    """A block whose error all ranks raise that share ``data``, the others where they next meet."""
    try:
        yield
    except Exception as error:
        if isinstance(data, Shared) and not isinstance(error, Refused | RankLost):
            _of_all("", None, error)
        raise


def of_all(data: Dataset, value: object) -> list:
    """Return the ``value`` of every rank, in their order, or [value] if ``data`` aren't shared."""
    return _of_all("value", value) if isinstance(data, Shared) else [value]


def gathered(data: Dataset, model: nn.Module, value: object) -> list:
    """Return the ``value`` of every rank, in their order, or [value] if ``data`` aren't shared.

    Raises ``Refused`` if ``model`` isn't the same on every rank, and ``RankLost``.
    """
    if not isinstance(data, Shared):
        return [value]
    networks, values = zip(*_of_all("network", (_digest(_values(model)), value)), strict=True)
    other = next((rank for rank, found in enumerate(networks) if found != networks[0]), None)
    if other is not None:
        raise Refused(
            f"The network of rank {other} isn't that of rank 0: give all ranks the same weights "
            "and buffers, as torch.distributed.broadcast does."
        )
    return list(values)


def summed(data: Dataset, model: nn.Module, values: dict) -> dict:
    """Return the sum over the ranks of each of ``values``, by name. Raises as ``gathered``."""
    sums: dict = {}
    for found in gathered(data, model, values):
        for name, value in found.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _of_all(what: str, value: object, error: Exception | None = None) -> list:
    """``value`` of each rank, in their order. ``what`` it is must be the same on all of them.

    With an ``error`` in its place, this rank tells the others why it stops, and all raise that.
    """
    why = error and str(error)
    if error and not isinstance(error, ValueError | TypeError):
        why = f"Rank {dist.get_rank()} has stopped: {first_line(error)}."
    found = [None] * dist.get_world_size()
    with meeting():
        dist.all_gather_object(found, (what, value, why))
    if reasons := [reason for *_, reason in found if reason]:
        raise Refused(reasons[0]) from error
    if len({kind for kind, *_ in found}) > 1:
        raise Refused("The ranks make different calls on shared data: make the same ones.")
    return [value for _, value, _ in found]


def _examples_digest(data: Dataset) -> bytes:
    """SHA-256 of the tensors, or of three examples, read with the same random numbers everywhere.

    What can't be read says so where it is needed.
    """
    size = len(data)
    with same_random_numbers(), suppress(Exception):
        whole = type(data) is TensorDataset
        examples = data.tensors if whole else [data[i] for i in {0, size // 2, size - 1}]
        return _digest(map(torch.as_tensor, tree_leaves(examples)))
    return b""


def _digest(values: Iterable[Tensor]) -> bytes:
    """SHA-256 of ``values``, the same however they are laid out in memory."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _values(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


@contextmanager
def meeting() -> Iterator[None]:
    """Raise ``RankLost``, with one sentence, if the ranks fail to meet in this block, and warn if
    this one waits for long.
    """

    def say_so() -> None:
        who = f"Rank {dist.get_rank()}" if dist.is_initialized() else "This process"
        warnings.warn(
            f"{who} has waited for the other ranks for {PATIENCE} seconds: each of them must make "
            "the same calls on shared data.",
            stacklevel=2,
        )

    word = threading.Timer(PATIENCE, say_so)
    word.daemon = True
    word.start()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(
            f"This process can't go on with the other ranks, and stops ({first_line(error)})."
        ) from error
    finally:
        word.cancel()


# Training


def in_parallel(model: nn.Module, data: Dataset) -> nn.Module:
    """Return what to train: ``model`` itself, or, where ``data`` are shared, DDP around it.

    All ranks start from the network of rank 0. Batch norm takes its statistics, as always in
    DistributedDataParallel, from each rank's part of the mini-batch, and those that stay are of
    rank 0.
    """
    if not isinstance(data, Shared):
        return model
    with meeting():  # a static graph may have parameters that aren't used
        return DistributedDataParallel(model, static_graph=True)


@contextmanager
def all_or_none(model: nn.Module) -> Iterator[None]:
    """What a rank raises in this block, all ranks raise that train ``model`` together.

    Otherwise they would wait for its gradients.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if isinstance(model, DistributedDataParallel):
        with meeting():
            failed = torch.tensor([failure is not None], dtype=torch.int32, device=model.device)
            dist.all_reduce(failed)
        if failed:
            _of_all("", None, failure)
    if failure:
        raise failure


def make_same(model: nn.Module, data: Dataset) -> None:
    """Give all ranks the weights and buffers of rank 0, if ``data`` are shared."""
    if isinstance(data, Shared):
        with meeting(), torch.no_grad():
            for value in _values(model):
                dist.broadcast(value, src=0)


def seed_of_rank(seed: int, data: Dataset) -> int:
    """Return ``seed`` for rank 0, and another seed drawn from it for each other rank."""
    rank = data.rank if isinstance(data, Shared) else 0
    drawn = torch.randint(2**63 - 1, (rank,), generator=torch.Generator().manual_seed(seed))
    return int(drawn[-1]) if rank else seed


# A program of several ranks


def start(device: torch.device) -> torch.device:
    """Join the other processes, if ``torchrun`` started this one; return where it computes.

    On GPUs, each process takes the one of its local rank. From now on SIGTERM, with which
    ``torchrun`` stops all when one has ended, is reported and raises ``KeyboardInterrupt``.

    Raises ``ValueError`` if there is no GPU for this process.
    """
    if not dist.is_torchelastic_launched():
        return device
    signal.signal(signal.SIGTERM, _interrupt)
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"Each process needs a GPU of its own, but this machine has {there}: type "
                f"torchrun --nproc-per-node={there}."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with meeting():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=GIVE_UP)
    return device


def _interrupt(number: int, frame: object) -> None:
    say("Stopped by torchrun, because another process has ended, or because it was told to stop.")
    raise KeyboardInterrupt(number)


def stop() -> None:
    """Take leave of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0 of its process group, or the only process."""
    return not _several() or dist.get_rank() == 0


def first_alone(function: Callable) -> Callable:
    """Let rank 0 alone call ``function``; on the others it does nothing, in ``with`` too."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        return function(*args, **kwargs) if is_first() else nullcontext()

    return called


def say(message: str) -> None:
    """Print why this process stops, unless another rank of ``torchrun`` has said why it does.

    When one rank stops, the others stop because of it, and needn't say so.
    """
    if dist.is_torchelastic_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is about to stop anyhow
        try:  # torchrun's own store, which outlives the ranks
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
            if store.add(f"said {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) > 1:
                return
        except RuntimeError:
            pass
    print(message, file=sys.stderr)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
