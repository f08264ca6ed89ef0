"""Random bad calls of everything public: each must end in a sentence of ours, and soon.

    python tests/bad_calls.py --calls 8540

prints how they ended, and some of each kind that shouldn't be. ``test_bad_calls.py`` runs a few.
"""

import argparse
import contextlib
import copy
import dis
import inspect
import itertools
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from networks import assert_same, state_of
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import FashionMNIST

import cnn_pruning
from cnn_pruning import CNN, TaylorPruner, criteria, iterative, measure
from cnn_pruning.network.reading import read
from cnn_pruning.oracle import oracle

PACKAGE = str(Path(cnn_pruning.__file__).parent)
DOCUMENTED = (ValueError, TypeError, FloatingPointError, ImportError, OSError, RuntimeError)
SECONDS = 10  # of a call that isn't taken for one that never ends


ENDLESS = 100_000  # who has asked for so many items would never end


class Hang(BaseException):
    """A call took longer than ``SECONDS``, or asked for an item too many of what never ends."""


class OwnError(Exception):
    """Raised by a caller's own function: it should come through as it is."""


# What is handed in. Each is made anew, because a call might change it.


def endless():
    for _ in range(ENDLESS):
        yield 1
    raise Hang


class EndlessItems:
    """Three long, by its own account; who counts for themselves never gets to the end."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == ENDLESS:
            raise Hang
        return 1


class Items(Dataset):
    def __init__(self, item=lambda x, y: (x, y), size=6):
        self.item, self.size = item, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.item(torch.full((1, 28, 28), i / 6), i % 3)


class Stream(IterableDataset):
    def __iter__(self):
        return endless()


def fails(*values):
    raise OwnError


def network(*last):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, stride=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(98, 3), *last),
    )


def with_nan():
    model = network()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    return model


def images(size=6, shape=(1, 28, 28), kind=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, *shape, generator=generator).to(kind)


def data(size=6, labels=None, **options):
    return TensorDataset(
        images(size, **options), torch.arange(size) % 3 if labels is None else labels
    )


NAMES = ("network.0", "network.2")
MODELS = [lambda: CNN((2, 3)), network]
DATA = [data, Items]
SCORES = [
    lambda: {NAMES[0]: torch.rand(2), NAMES[1]: torch.rand(3)},
    lambda: {NAMES[1]: torch.rand(3)},
]
FILTERS = [lambda: {NAMES[0]: [1]}, lambda: {NAMES[1]: (0, 2)}, dict]
SHAPES = [lambda: (1, 28, 28), lambda: [1, 28, 28]]


def each(*values):
    return [lambda value=value: copy.deepcopy(value) for value in values]


RIGHT = {
    **dict.fromkeys(("model", "network"), MODELS),
    **dict.fromkeys(("data", "train", "val"), DATA),
    "scores": SCORES,
    "filters": FILTERS,
    "image_shape": SHAPES,
    **dict.fromkeys(("n", "per_step", "min_filters", "epochs", "updates"), each(1, np.int64(1))),
    "repeats": each(2),
    "batch_size": each(4, 6, 100),
    "seed": each(0, 3),
    "lr": each(1e-3),
    "keep": each((), [NAMES[0]], NAMES[1]),
    "max_share": each(1.0, 0.5),
    "multiple_of": each(1, 2),
    "linear": each(False, True),
    "normalize": each(True, False),
    "channels": each((2, 3), [1]),
    "cost": [lambda: lambda outputs, labels: outputs.square().sum(1)],
    "criterion": [*each(*criteria.CRITERIA), lambda: lambda z, slope: (z * slope).mean(2)],
    "rescore": [lambda: lambda model, scores: scores],
    "on_epoch": [lambda: lambda row: None],
    "root": each("here"),
}
NEARLY = {  # what one may well take for right
    "model": [
        *(lambda: nn.ReLU, lambda: nn.ReLU(), lambda: nn.Linear(3, 2), lambda: CNN, with_nan),
        *(
            lambda: torch.optim.swa_utils.AveragedModel(CNN((2, 3))),
            lambda: nn.DataParallel(network()),
        ),
        *(
            lambda: network().state_dict(),
            lambda: torch.compile(network(), backend="eager"),
            lambda: network().forward,
        ),
        *(
            lambda: network().double(),
            lambda: network(nn.Softmax(1)),
            lambda: network(nn.Flatten(0)),
        ),
        *(
            lambda: nn.Sequential(),
            lambda: nn.LazyConv2d(3, 3),
            lambda: network().requires_grad_(False),
        ),
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2)),
    ],
    "data": [
        *(
            images,
            lambda: images().numpy(),
            lambda: [images(), images()],
            lambda: DataLoader(data()),
        ),
        *(lambda: (images(), torch.arange(6)), lambda: {"images": images()}, Stream, endless),
        *(lambda: TensorDataset(), lambda: TensorDataset(images()), lambda: data(0), EndlessItems),
        *(
            lambda: Items(size=0),
            lambda: Items(size=-1),
            lambda: Items(size=None),
            lambda: Items(fails),
        ),
        *(lambda: Items(lambda x, y: {"x": x}), lambda: Items(lambda x, y: (x, y, y))),
        *(lambda: Items(lambda x, y: (x.numpy(), y)), lambda: Items(lambda x, y: (x, str(y)))),
        *(
            lambda: Items(lambda x, y: (x, None)),
            lambda: Items(lambda x, y: (None, y)),
            lambda: Items(None),
        ),
        *(
            lambda: Items(lambda x, y: (x, {"y": y})),
            lambda: Items(lambda x, y: (x[:, : y + 9], y)),
        ),
        *(lambda: Items(lambda x, y: (x, x[0, 0, :y])), lambda: Items(lambda x, y: ([1.0], y))),
        *(lambda: data(kind=torch.uint8), lambda: data(kind=torch.float64), lambda: data(shape=())),
        *(
            lambda: data(shape=(28, 28)),
            lambda: data(shape=(3, 28, 28)),
            lambda: data(shape=(1, 0, 0)),
        ),
        *(lambda: data(labels=torch.rand(6)), lambda: data(labels=torch.arange(6) * 9 - 5)),
        *(
            lambda: data(labels=torch.rand(6, 10)),
            lambda: data(labels=torch.ones(6, dtype=torch.bool)),
        ),
        *(
            lambda: TensorDataset(images() * torch.nan, torch.arange(6)),
            lambda: data(labels=images()),
        ),
        *(lambda: TensorDataset(torch.tensor(1.0).expand(6), torch.arange(6)), lambda: data),
        *(lambda: data(kind=torch.complex64), lambda: images().unbind(), lambda: range(6)),
    ],
    "scores": [
        *(
            lambda: {NAMES[0]: [1.0]},
            lambda: {NAMES[0]: np.ones(2)},
            lambda: {NAMES[0]: torch.ones(2, 2)},
        ),
        *(lambda: {NAMES[0]: torch.tensor(1.0)}, lambda: {NAMES[0]: torch.tensor([torch.nan])}),
        *(
            lambda: {1: torch.ones(2)},
            lambda: {None: torch.ones(2)},
            lambda: {NAMES[0]: torch.ones(0)},
        ),
        *(
            lambda: torch.ones(2),
            lambda: [torch.ones(2)],
            lambda: {NAMES[0]: torch.tensor([torch.inf])},
        ),
        *(lambda: {NAMES[0]: torch.ones(2, dtype=torch.complex64)}, lambda: {NAMES[0]: None}),
        *(
            lambda: {NAMES[0]: torch.ones(2, device="meta")},
            lambda: {NAMES[0]: torch.eye(2).to_sparse()},
        ),
        *(
            lambda: {NAMES[0]: torch.ones(2) == 1},
            lambda: {NAMES[0]: torch.ones(2, requires_grad=True)},
        ),
        lambda: {NAMES[0]: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)},
    ],
    "filters": [
        *(lambda: {NAMES[0]: 1}, lambda: {NAMES[0]: [5]}, lambda: {NAMES[0]: [0, 0]}, lambda: [0]),
        *(
            lambda: {"network": [0]},
            lambda: {0: [0]},
            lambda: {NAMES[0]: endless()},
            lambda: {NAMES[0]: None},
        ),
        *(lambda: {NAMES[0]: [0, 1]}, lambda: {NAMES[0]: "01"}, lambda: {NAMES[0]: [0.0]}),
        *(
            lambda: {NAMES[0]: EndlessItems()},
            lambda: {NAMES[0]: [True]},
            lambda: {NAMES[0]: [[0]]},
        ),
        *(
            lambda: {NAMES[0]: torch.eye(2)},
            lambda: {NAMES[0]: torch.tensor(0)},
            lambda: {NAMES[0]: {0: 1}},
        ),
        *(lambda: {NAMES[0]: map(fails, [1])}, lambda: {(1, 2): [0]}, lambda: {NAMES[0]: [10**30]}),
    ],
    "image_shape": each(
        *((28, 28), (28, 28, 1), (1, 0, 0), (1, -28, 28), (1, 2.5, 3), ("1", 2), (), (3, 28, 28)),
        *((1, 28, 28, 28), torch.Size([1, 28, 28]), (1, 10**9, 10**9), (1, 10**30, 1), (1, 1, 1)),
    ),
    "criterion": [
        *each("tailor", ["taylor"], nn.CrossEntropyLoss()),
        *(
            lambda: fails,
            lambda: len,
            lambda: torch.sum,
            lambda: lambda z: z,
            lambda: criteria.oracle,
        ),
        *(
            lambda: lambda z, slope: None,
            lambda: lambda z, slope: z,
            lambda: lambda z, slope: z @ slope,
        ),
        *(lambda: nn.functional.cross_entropy, lambda: dict, lambda: lambda z, slope: z.foo),
    ],
    "cost": [
        *(
            lambda: fails,
            lambda: len,
            lambda: nn.CrossEntropyLoss(),
            lambda: nn.functional.mse_loss,
        ),
        *(lambda: lambda outputs, labels: outputs, lambda: lambda outputs: outputs, lambda: "mse"),
        *(lambda: lambda outputs, labels: outputs.detach().sum(1), lambda: lambda *_: None),
        *(
            lambda: lambda outputs, labels: outputs @ labels,
            lambda: lambda *_: torch.zeros(4).long(),
        ),
    ],
    "rescore": [
        *(
            lambda: fails,
            lambda: len,
            lambda: lambda *_: None,
            lambda: lambda *_: {"a": torch.ones(2)},
        ),
        lambda: lambda *_: {NAMES[0]: torch.ones(9)},
    ],
    "max_share": each(-1, 2, "1", None, float("nan")),
    "multiple_of": each(0, -1, 2.0, {"a": 1}, {NAMES[0]: 0}, None),
    "linear": each(None, 1),
    "keep": [*each("a", ["a"], [1], [[NAMES[0]]], {NAMES[0]: 1}, (None,)), endless, EndlessItems],
    "channels": [*each((), (0,), (2, -1), (2.0,), "23", (10**30, 2), [[2]]), endless],
    "on_epoch": [lambda: fails, lambda: lambda: None, lambda: len],
    "lr": each(
        0, -1, float("nan"), float("inf"), "1e-3", torch.tensor(1e-3), np.float32(1e-3), 1e300
    ),
    "seed": each(-1, 2**64, 2**70, -(2**80), 0.5, np.uint64(2**63), torch.tensor(3)),
    "root": each(
        "", ".", "nowhere/at/all", Path("there"), b"there", "a\0b", "~nobody-of-this-name"
    ),
}
NEARLY |= {"network": NEARLY["model"], "train": NEARLY["data"], "val": NEARLY["data"]}
JUNK = [
    *each(None, True, False, 0, -1, 2, 3.5, float("nan"), "", "resnet18", b"x", [], {}, (), [1, 2]),
    *each({"a": 1}, {1, 2}, 1j, np.array([1.0]), np.float64(2), torch.tensor(1), torch.rand(2, 3)),
    *(object, lambda: object(), lambda: len, endless, EndlessItems, lambda: slice(1), lambda: ...),
    *(lambda: itertools.cycle([]), lambda: Path("."), lambda: torch.float32, lambda: type),
]
NO_LIMIT = ("epochs", "updates", "repeats")  # a large number is right there, and takes long
LARGE = each(10**12, 10**30, -(10**30), np.int8(127))


def latency(model, batch_size, repeats=2, image_shape=None):
    return measure.latency(model, batch_size=batch_size, repeats=repeats, image_shape=image_shape)


def costs(model):
    return measure.costs(model)


def score(model, data, criterion="taylor", batch_size=4, cost=None):
    return criteria.score(read(model), data, criterion, batch_size, cost)


def mask_filters(**options):
    with cnn_pruning.mask_filters(**options):
        pass


PRUNER = TaylorPruner(CNN((2, 3)))
PRUNER.score(data())


def pruner(**options):
    return TaylorPruner(**options)


def pruner_score(data, batch_size=4):
    return PRUNER.score(data, batch_size)


def pruner_select(n):
    return PRUNER.select(n)


def pruner_prune(n):
    return PRUNER.prune(n)


def prune_iteratively(model, train, val, **options):
    steps = iterative.prune_iteratively(model, train, val, **{"updates": 1, **options})
    return list(itertools.islice(steps, 2))


@dataclass
class Public:
    """A function, what it must be given, and what it may be given."""

    call: Callable
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    often: int = 2

    @property
    def name(self):
        return self.call.__name__


PUBLIC = [
    Public(CNN, (), ("channels",)),
    Public(cnn_pruning.fashion_mnist, ("root",), often=1),
    Public(
        cnn_pruning.fit,
        ("model", "train", "val"),
        ("epochs", "batch_size", "lr", "seed", "on_epoch"),
        4,
    ),
    Public(cnn_pruning.evaluate, ("model", "data"), ("batch_size",), 3),
    Public(
        cnn_pruning.filter_scores,
        ("model", "data"),
        ("criterion", "batch_size", "cost", "keep", "linear"),
        5,
    ),
    Public(cnn_pruning.normalize, ("scores",)),
    Public(
        cnn_pruning.select_filters,
        ("scores", "n"),
        ("min_filters", "keep", "max_share", "multiple_of"),
        4,
    ),
    Public(mask_filters, ("model", "filters"), ("data",), often=4),
    Public(cnn_pruning.remove_filters, ("model", "filters"), ("data",), often=4),
    Public(pruner, ("model",), ("criterion", "min_filters", "keep", "cost", "normalize")),
    Public(pruner_score, ("data",), ("batch_size",)),
    Public(pruner_select, ("n",)),
    Public(pruner_prune, ("n",)),
    Public(
        prune_iteratively,
        ("model", "train", "val", "filters"),
        (
            *("per_step", "updates", "criterion", "rescore", "min_filters", "keep", "batch_size"),
            *("lr", "seed", "max_share", "multiple_of"),
        ),
        4,
    ),
    Public(measure.count_parameters, ("model",)),
    Public(measure.count_macs, ("model", "image_shape"), often=3),
    Public(latency, ("model", "batch_size", "image_shape"), ("repeats",), 3),
    Public(costs, ("model",), often=1),
    Public(oracle, ("model", "data"), ("batch_size", "cost")),
    Public(score, ("model", "data"), ("criterion", "batch_size", "cost")),
]


def bad_call(rng: random.Random) -> tuple[Public, dict[str, Callable]]:
    """A function and makers of its arguments, one or two of which are likely to be wrong."""
    public = rng.choices(PUBLIC, [p.often for p in PUBLIC])[0]
    names = [*public.needs, *(name for name in public.takes if rng.random() < 0.5)]
    if not names:
        names = list(public.takes)
    wrong = set(rng.choices(names, k=rng.choice([1, 1, 1, 2])))
    makers = {}
    for name in names:
        right = RIGHT["n" if (public.call, name) == (prune_iteratively, "filters") else name]
        makers[name] = rng.choice(right)
        if name in wrong:
            large = [] if name in NO_LIMIT else LARGE
            others = rng.choice(list(RIGHT.values()))
            near = NEARLY.get(name, JUNK + large)
            pool = rng.choice([near, near, near, JUNK + large, others])
            makers[name] = rng.choice(pool)
    return public, makers


def seen(value: object) -> object:
    """What of an argument a call could change; of a network without weights, that it has none."""
    if isinstance(value, nn.Module) and not any(map(is_lazy, value.parameters())):
        return {**state_of(value), "random": None}
    if isinstance(value, TensorDataset):
        return [tensor.clone() for tensor in value.tensors]
    if isinstance(value, torch.Tensor):
        return [str(value)]
    if isinstance(value, dict | list | tuple | set):
        parts = value.items() if isinstance(value, dict) else value
        return [type(value), *(seen(part) for part in parts)]
    return repr(value)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def said_by(error: BaseException) -> str:
    """Who made ``error``: a ``raise`` in the package, with one sentence, or a caller's function."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    code = place.tb_frame.f_code
    message = str(error)
    if code.co_filename == __file__ and place is not error.__traceback__:
        return "own error"
    ours = (
        isinstance(error, DOCUMENTED)
        and code.co_filename.startswith(PACKAGE)
        and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
        and message.endswith(".")
        and "\n" not in message
        and len(message) < 500
    )
    return "documented" if ours else "raw"


def outcome(public: Public, makers: dict[str, Callable]) -> tuple[str, str]:
    """How the call ended, in a word and in more words."""
    arguments = {name: make() for name, make in makers.items()}
    call = f"{public.name}({', '.join(f'{k}={_short(v)}' for k, v in arguments.items())})"
    before = {name: seen(value) for name, value in arguments.items()}
    numbers = torch.get_rng_state()
    changes = ()
    try:
        with time_limit():
            public.call(**arguments)
        how, why = "fine", ""
        changes = ("model",) if public.call is cnn_pruning.fit else ()
    except Hang:
        return "hang", call
    except Exception as error:
        how = said_by(error)
        why = f"{type(error).__name__}: {error}"
    for name in arguments.keys() - set(changes):
        try:
            assert_same(seen(arguments[name]), before[name])
        except AssertionError:
            return "changed", f"{name} of {call}: {why}"
    drawn = "random" in (
        arguments.get("criterion"),
        getattr(arguments.get("criterion"), "__name__", ""),
    )
    if not drawn and not torch.equal(numbers, torch.get_rng_state()):
        if not isinstance(public.call, type):  # a new network draws its weights
            return "changed", f"random numbers by {call}: {why}"
    return how, f"{call}: {why}"


def _short(value: object) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    return " ".join(repr(value).split())[:80]


def run(calls: int, seed: int) -> dict[str, list[str]]:
    """How ``calls`` random calls ended: descriptions by outcome."""
    rng = random.Random(seed)
    ended: dict[str, list[str]] = {}
    here = os.getcwd()
    mirrors = FashionMNIST.mirrors
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        FashionMNIST.mirrors = [Path(folder, "no mirror").as_uri() + "/"]
        try:
            for _ in range(calls):
                torch.manual_seed(0)
                how, what = outcome(*bad_call(rng))
                ended.setdefault(how, []).append(what)
        finally:
            os.chdir(here)
            FashionMNIST.mirrors = mirrors
    return ended


if __name__ == "__main__":
    import warnings

    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(run)))
    parser.add_argument("--calls", type=int, default=8540)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="examples of each kind of bad ending")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ended = run(options.calls, options.seed)
    for how, calls in sorted(ended.items()):
        print(f"{len(calls):6} {how}")
    for how in ("raw", "hang", "changed"):
        kinds = Counter((c.split("(")[0], c.rpartition("): ")[2][:60]) for c in ended.get(how, []))
        for (name, why), count in kinds.most_common():
            print(f"\n{how} {count} x {name}: {why}")
            same = [c for c in ended[how] if c.startswith(name + "(") and why in c]
            print(*(f"    {c[:300]}" for c in same[: options.show]), sep="\n")
