"""What several processes compute together is what one process computes alone."""

import itertools
import os
import re
import signal
import threading
import time
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from networks import assert_same, state_of
from stores import Pairs, runs
from torch import nn
from torch.utils.data import Subset, TensorDataset

from cnn_pruning import TaylorPruner, evaluate, filter_scores, fit, measure, normalize
from cnn_pruning.criteria import CRITERIA
from cnn_pruning.experiments import ranks
from cnn_pruning.experiments.data import batches, epoch
from cnn_pruning.experiments.ranks import divide, pool
from cnn_pruning.experiments.training import refresh_batch_norms
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.oracle import oracle

CLASSES = 3


class Unread(Pairs):
    """A dataset whose files are gone, once ``left`` examples were read."""

    def __init__(self, data, left=0):
        super().__init__(data)
        self.left = left

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("no file")
        return super().__getitem__(i)


def dataset(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 1, 6, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (size,), generator=generator))


def network(seed=0, norm=False, dropout=0.0):
    """A chain in float64, so that rounding is far below what a fault would change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = OrderedDict(
            first=nn.Conv2d(1, 4, 3, padding=1),
            norm=nn.BatchNorm2d(4) if norm else nn.Identity(),
            active=nn.ReLU(),
            second=nn.Conv2d(4, 5, 3),
            also_active=nn.ReLU(),
            dropout=nn.Dropout(dropout),
            flatten=nn.Flatten(),
            linear=nn.Linear(80, CLASSES),
        )
        return nn.Sequential(layers).double()


def rolled(model: nn.Module, by: int) -> nn.Module:
    """The same numbers in another order: each parameter's first axis is rolled."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.roll(by, 0))
    return model


class Resting(nn.Module):
    """A network with a layer that it doesn't use."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.resting = network(seed=1)

    def forward(self, images):
        return self.network(images)


def residual():
    """A network whose maps are added."""
    pytest.importorskip("torch_pruning")

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, images):
            x = self.first(images).relu()
            return self.linear((x + self.second(x)).relu().mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Residual().double()


TRAIN, VAL = dataset(23), dataset(10, seed=1)
FEW = {size: dataset(size, seed=2) for size in (1, 5)}
FIT = {"epochs": 2, "batch_size": 8, "lr": 1e-2}  # mini-batches of 8, 8 and 7
SMALL = {"epochs": 2, "batch_size": 2, "lr": 1e-2}  # on 3 ranks, one has no part in any
SCHEDULE = {"filters": 5, "per_step": 2, "batch_size": 8, "lr": 1e-2}


def cost(outputs, labels):
    return (outputs.square().sum(1) + labels).sqrt()


def fitted(train, val, model=None, **options):
    model = model or network()
    history = fit(model, train, val, **options)
    return history, dict(model.state_dict())


def steps(train, val, model=None, **options):
    found = list(prune_iteratively(model or network(), train, val, **SCHEDULE | options))
    return [
        (step.removed, step.val_loss, step.val_accuracy, dict(step.model.state_dict()))
        for step in found
    ]


def timed(rank):
    """A schedule down to 6 milliseconds, of which each rank measures another number."""

    def latency(model, **_):
        return [(rank + sum(m.out_channels for m in model.modules() if hasattr(m, "kernel_size")),)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "latency", latency)
        target = {"milliseconds": 6, "filters": None}
        return steps(divide(TRAIN), divide(VAL), updates=0, **target)


def refreshed(data):
    model = network(norm=True)
    refresh_batch_norms(model, data, batch_size=7)
    return dict(model.state_dict())


def flawed(z, slope):
    """A criterion that fails on the last rank alone."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("no such map")
    return z.amax(2)


def nothing(network, scores):
    return {}


def normalized(network, scores):
    return normalize(scores)


def at_random(network, scores):
    return {layer: torch.rand(len(values)) for layer, values in scores.items()}


def results(of):
    """What the tests compare; ``of`` is ``divide`` for several ranks, and nothing for one."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # for random scores
    model = network()
    before = state_of(model)
    found = {
        "scores": {
            (name, size): filter_scores(model, of(data), name, batch_size=4)
            for name in CRITERIA
            for size, data in FEW.items()
        },
        "items": filter_scores(model, of(Pairs(TRAIN)), batch_size=2),
        "function": filter_scores(model, of(TRAIN), lambda z, slope: z.amax(2), batch_size=4),
        "cost": filter_scores(model, of(TRAIN), cost=cost, batch_size=7),
        "pruner": TaylorPruner(model).score(of(TRAIN)),
        "groups": filter_scores(residual(), of(FEW[5]), batch_size=4),
        "refreshed": refreshed(of(TRAIN)),
        "evaluate": [evaluate(model, of(data), 4) for data in (VAL, *FEW.values(), Pairs(VAL))],
    }
    # Random scores are drawn from the caller's numbers
    assert_same(state_of(model) | {"random": None}, before | {"random": None})
    train, val = of(TRAIN), of(VAL)
    return found | {
        "fit": fitted(train, val, **FIT),
        "fit items": fitted(of(Pairs(TRAIN)), VAL, **FIT),
        "fit small": fitted(of(FEW[5]), val, **SMALL),
        "fit resting": fitted(train, val, Resting(), **FIT),
        "steps": steps(train, val, updates=4),
        "steps small": steps(of(FEW[5]), val, updates=3, batch_size=2),
        "steps, oracle": steps(train, val, updates=2, criterion="oracle_abs"),
        "steps, no updates": steps(train, val, updates=0),
    }


def alone():
    """What differs between several ranks and one, or needs several."""
    rank, several = dist.get_rank(), dist.get_world_size()
    part = Subset(TRAIN, range(rank, len(TRAIN), several))
    first = FEW[5] if rank == 0 else Subset(FEW[5], [])
    found = {
        "pool": [
            filter_scores(network(), pool(part), name, batch_size=2)
            for name in CRITERIA
            if name not in ("random", "obd")
        ],
        "pool, empty": filter_scores(network(), pool(first)),
        "pool, evaluate": evaluate(network(), pool(part)),
        "not shared": filter_scores(network(), part),
        "norm": fitted(divide(TRAIN), divide(VAL), network(norm=True), **FIT),
        "norm, steps": steps(divide(TRAIN), divide(VAL), network(norm=True), updates=2),
        "milliseconds": timed(rank),
        "random rescore": steps(divide(TRAIN), divide(VAL), updates=0, rescore=at_random),
        "dropout": fitted(divide(TRAIN), divide(VAL), network(dropout=0.5), **FIT),
        "random": steps(divide(TRAIN), divide(VAL), criterion="random", updates=2),
        "other weights": fitted(divide(TRAIN), VAL, network(seed=rank), **FIT),
    }
    if rank == 0:
        found["first alone"] = filter_scores(network(), TRAIN)
    found["seeds"] = ranks.of_all(divide(TRAIN), ranks.seed_of_rank(7, divide(TRAIN)))

    def refused(function):
        with pytest.raises((ValueError, FloatingPointError, TypeError, ranks.RankLost)) as error:
            function()
        return str(error.value)

    def off(data, **changed):
        """Shared data that are other ones on the last rank, as after an error in a file there."""
        shared = divide(data)
        if rank == several - 1:
            images, labels = (tensor.clone() for tensor in data.tensors)
            labels[:] = changed.get("label", labels)
            gone = "unread" in changed
            shared.data = Unread(data, changed["unread"]) if gone else TensorDataset(images, labels)
        return shared

    mine = rank == several - 1
    flipped = TensorDataset(*(t.flip(0) if mine else t for t in TRAIN.tensors))
    moved = network(norm=True)
    moved.norm.running_mean.fill_(rank)
    trained, with_norm, unreadable = network(), network(norm=True), off(TRAIN, unread=2)
    before, of_norm = state_of(trained), state_of(with_norm)
    found["together"] = {
        "batch_size": refused(lambda: evaluate(network(), divide(TRAIN), batch_size=4 + mine)),
        "batch_size ": refused(
            lambda: filter_scores(network(), divide(TRAIN), batch_size=4 + mine)
        ),
        "criterion": refused(
            lambda: filter_scores(network(), divide(TRAIN), "apoz" if mine else "taylor")
        ),
        "labels must  ": refused(lambda: filter_scores(network(), off(TRAIN, label=7))),
        "updates must": refused(lambda: steps(divide(TRAIN), VAL, updates=-1 if mine else 1)),
        "there are no layers": refused(
            lambda: steps(divide(TRAIN), VAL, rescore=nothing if mine else normalized, updates=0)
        ),
        "updates": refused(lambda: steps(divide(TRAIN), VAL, updates=2 + mine)),
        "cost ": refused(lambda: steps(divide(TRAIN), VAL, cost=cost if mine else None)),
        "keep": refused(lambda: steps(divide(TRAIN), VAL, keep=["none"] if mine else [])),
        "per_step": refused(lambda: steps(divide(TRAIN), VAL, per_step=1 + mine)),
        "no picture": refused(
            lambda: fitted(divide(TRAIN), VAL, trained, on_epoch=no_picture if mine else print)
        ),
        "lr ": refused(lambda: steps(divide(TRAIN), VAL, lr=1e-3 * (1 + mine))),
        "epochs": refused(lambda: fitted(divide(TRAIN), VAL, epochs=1 + mine)),
        "lr": refused(lambda: fitted(divide(TRAIN), VAL, lr=1e-3 * (1 + mine))),
        "seed": refused(lambda: fitted(divide(TRAIN), VAL, seed=int(mine))),
        "cost": refused(lambda: evaluate(network(), divide(TRAIN), cost=cost if mine else None)),
        "epochs must": refused(lambda: fitted(divide(TRAIN), VAL, epochs=-1 if mine else 1)),
        "data that differ": refused(lambda: divide(flipped)),
        "data that differ ": refused(lambda: divide(Pairs(flipped))),
        "network": refused(lambda: evaluate(moved, divide(TRAIN))),
        "labels must": refused(lambda: evaluate(network(), off(TRAIN, label=7))),
        "labels must ": refused(lambda: fitted(off(TRAIN, label=7), VAL, trained, **FIT)),
        "has stopped: no file.": refused(lambda: evaluate(network(), off(TRAIN, unread=0))),
        "has stopped: no file. ": refused(
            lambda: fitted(off(TRAIN, unread=4), VAL, trained, **FIT)
        ),
        "stopped: no file.": refused(lambda: steps(off(TRAIN, unread=0), VAL)),
        "stopped: no file. ": refused(lambda: steps(off(TRAIN, unread=12), VAL)),
        "stopped: no file.   ": refused(lambda: oracle(network(), off(TRAIN, unread=2))),
        "stopped: no file.    ": refused(lambda: refresh_batch_norms(with_norm, unreadable)),
        "The criterion failed": refused(
            lambda: steps(divide(TRAIN), VAL, criterion=flawed, updates=2)
        ),
        "different calls": refused(
            lambda: evaluate(network(), divide(TRAIN)) if mine else fitted(divide(TRAIN), VAL)
        ),
    }
    assert_same(state_of(trained) | {"random": None}, before | {"random": None})
    assert_same(state_of(with_norm) | {"random": None}, of_norm | {"random": None})
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert all(each.finished.is_set() for each in timers)

    torch.manual_seed(0)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES), nn.BatchNorm1d(CLASSES)).double()
    broken = network().float()  # in which a huge learning rate overflows
    single = [TensorDataset(data[:][0].float(), data[:][1]) for data in (TRAIN, VAL)]
    before = state_of(broken)
    found["errors"] = {
        "lengths": refused(lambda: divide(part)) if len(TRAIN) % several else "",
        "networks": refused(lambda: filter_scores(network(seed=rank), divide(TRAIN))),
        "order": refused(lambda: filter_scores(rolled(network(), by=rank), divide(TRAIN))),
        "train on parts": refused(lambda: fit(network(), pool(part), VAL)),
        "refresh from parts": refused(lambda: refreshed(pool(part))),
        "all empty": refused(lambda: filter_scores(network(), pool(Subset(TRAIN, [])))),
        "norm": refused(lambda: fit(normed, divide(FEW[5]), VAL, batch_size=3)),
        "loss": refused(lambda: fit(broken, *map(divide, single), lr=1e30, batch_size=8)),
        "steps": refused(lambda: steps(*map(divide, single), broken, updates=5, lr=1e30)),
    }
    assert_same(state_of(broken) | {"random": None}, before | {"random": None})
    return found


def no_picture(row):
    raise ValueError("There is no picture.")


def late():
    """The last rank is late: what the others say."""
    data = divide(TRAIN)
    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(ranks, "PATIENCE", 0.1)
        wait = 0.5 if dist.get_rank() == dist.get_world_size() - 1 else 0
        time.sleep(wait)
        evaluate(network(), data)
        scoring = len(said)
        fitted(data, VAL, epochs=2, on_epoch=lambda row: time.sleep(wait))
    return [str(warning.message) for warning in said], scoring


def one_dies():
    """Rank 1 dies while the ranks train: what the others raise, and what is left of the network."""
    model = network()
    before = state_of(model)

    def die(row):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ranks.RankLost) as error:
        fit(model, divide(TRAIN), divide(VAL), on_epoch=die, **FIT)
    assert_same(state_of(model) | {"random": None}, before | {"random": None})
    return str(error.value)


def work(rank, several, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=several)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(divide), alone()
    torch.save(found, folder / f"{rank}.pt")
    torch.save(late(), folder / f"late-{rank}.pt")
    torch.save(one_dies(), folder / f"death-{rank}.pt")


@pytest.fixture(scope="module", params=[2, 3])
def folder(request, processes, tmp_path_factory):
    """Where each of several ranks wrote what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        processes.Process(target=work, args=(rank, request.param, folder))
        for rank in range(request.param)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)  # seconds, where the machine is busy
        process.kill()
    expected = [-signal.SIGKILL if rank == 1 else 0 for rank in range(request.param)]
    assert [process.exitcode for process in started] == expected
    return folder


@pytest.fixture(scope="module")
def together(folder):
    """What the ranks found: [(results, alone)]."""
    files = sorted(folder.glob("[0-9].pt"))
    return [torch.load(file, weights_only=True) for file in files]


@pytest.fixture(scope="module")
def one():
    return results(lambda data: data)


def assert_close(left, right, tolerance):
    """Equal up to ``tolerance`` in all numbers, and equal in all else."""
    if isinstance(left, dict):
        assert list(left) == list(right)
        left, right = list(left.values()), list(right.values())
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(left, torch.Tensor | float):
        left, right = torch.as_tensor(left), torch.as_tensor(right)
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    else:
        assert left == right


def test_all_ranks_have_the_same_to_the_last_bit(together):
    (first, first_alone), *others = together
    for found, found_alone in others:
        assert_same(found, first)
        for name in found_alone.keys() - {"not shared"}:
            assert_same(found_alone[name], first_alone[name])


# Sums of a few numbers in another order: float64 rounds them to 1e-16 of their size.
@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
@pytest.mark.parametrize("size", FEW)
def test_the_scores_are_those_of_one_process(together, one, name, size):
    assert_close(together[0][0]["scores"][name, size], one["scores"][name, size], 1e-12)


@pytest.mark.parametrize(
    "what", ["items", "function", "cost", "pruner", "groups", "evaluate", "refreshed"]
)
def test_what_is_computed_without_training_is_that_of_one_process(together, one, what):
    assert_close(together[0][0][what], one[what], 1e-12)


# Adam divides by the root of the squared gradients, which makes rounding of small ones larger.
@pytest.mark.parametrize("what", ["fit", "fit items", "fit small", "fit resting"])
def test_training_gives_the_weights_and_losses_of_one_process(together, one, what):
    assert_close(together[0][0][what], one[what], 1e-9)


@pytest.mark.parametrize("what", ["steps", "steps small", "steps, oracle", "steps, no updates"])
def test_the_schedule_removes_what_one_process_removes(together, one, what):
    assert len(one[what]) == 2
    assert_close(together[0][0][what], one[what], 1e-9)


def test_parts_that_the_ranks_have_are_pooled(together):
    found = together[0][1]
    names = [name for name in CRITERIA if name not in ("random", "obd")]
    expected = [filter_scores(network(), TRAIN, name) for name in names]
    assert_close(found["pool"], expected, 1e-12)
    assert_close(found["pool, empty"], filter_scores(network(), FEW[5]), 1e-12)
    assert_close(found["pool, evaluate"], evaluate(network(), TRAIN), 1e-12)


def test_what_is_not_shared_stays_of_one_rank(together):
    for rank, (_, found) in enumerate(together):
        part = Subset(TRAIN, range(rank, len(TRAIN), len(together)))
        assert_same(found["not shared"], filter_scores(network(), part))
    assert_same(together[0][1]["first alone"], filter_scores(network(), TRAIN))


def test_training_starts_from_the_weights_of_rank_0(together, one):
    assert_close(together[1][1]["other weights"], one["fit"], 1e-9)


def test_every_rank_draws_its_own_dropout(together):
    seeds = together[0][1]["seeds"]
    assert seeds[0] == 7
    assert len(set(seeds)) == len(together)


def test_what_the_ranks_can_not_do_together_is_refused_by_all(together):
    for _, found in together:
        errors = found["errors"]
        assert "different lengths, [" in errors["lengths"] and "pool" in errors["lengths"]
        assert "rank 1 isn't that of rank 0" in errors["networks"]
        assert "rank 1 isn't that of rank 0" in errors["order"]
        assert "divide, not pool" in errors["train on parts"]
        assert "divide, not pool" in errors["refresh from parts"]
        assert "empty" in errors["all empty"]
        assert "single image to a rank" in errors["norm"]
        assert "learning rate lower" in errors["loss"] and "an lr lower" in errors["steps"]


def test_what_one_rank_has_otherwise_or_can_not_use_all_ranks_refuse_alike(together):
    for name, sentence in together[0][1]["together"].items():
        assert name.strip() in sentence


@pytest.mark.parametrize("several", [1, 2, 3, 4, 5])
def test_each_image_counts_once_and_alike_however_many_ranks_share_few(monkeypatch, several):
    monkeypatch.setattr(ranks, "_of_all", lambda what, value: [value])  # they don't meet
    for images, batch_size in itertools.product([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]):
        data = TensorDataset(torch.arange(images).view(-1, 1), torch.zeros(images).long())
        read = []
        for rank in range(several):
            shared = object.__new__(ranks.Shared)
            shared.data, shared.whole, shared.length = data, True, images
            shared.rank, shared.ranks, shared.part = rank, several, slice(rank, None, several)
            loader = batches(shared, batch_size, torch.Generator().manual_seed(0))
            read.append(list(epoch(loader, shared, batch_size)))
            alone = [x for part, _ in batches(shared, batch_size) for x in part.flatten().tolist()]
            assert alone == [i for i in range(images) if i % batch_size % several == rank]
        seen = torch.zeros(images)
        left = images
        for step in zip(*read, strict=True):  # every rank takes part in every one
            size, weight = min(batch_size, left), torch.zeros(images)
            left -= size
            for part, _, divisor in step:  # ranks' gradients are averaged
                assert len(part)  # batch norm can't take none
                weight[part.flatten()] += 1 / divisor / several
            assert weight[weight > 0].tolist() == pytest.approx([1 / size] * size)
            seen += weight > 0
        assert (seen == 1).all()


def test_the_gpu_of_a_process_is_that_of_its_number_on_its_machine(monkeypatch):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda kind, timeout: joined.append(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("RANK", "3")
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert ranks.start(torch.device("cuda")) == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ValueError, match="this machine has 2"):
            ranks.start(torch.device("cuda"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert joined == ["nccl"]


def test_who_waits_for_a_rank_says_so(folder):
    *waiting, _ = [torch.load(file) for file in sorted(folder.glob("late-*.pt"))]
    for rank, (said, scoring) in enumerate(waiting):
        assert 0 < scoring < len(said)  # and again in training
        for sentence in said:
            assert f"Rank {rank} has waited for the other ranks" in sentence


def test_a_rank_that_dies_ends_the_training_of_the_others_with_their_weights_restored(folder):
    files = sorted(folder.glob("death-*.pt"))
    assert files[0].name == "death-0.pt" and "death-1.pt" not in {file.name for file in files}
    for file in files:
        said = torch.load(file)
        assert said.startswith("This process can't go on with the other ranks")
        assert "\n" not in said


def test_a_rank_that_runs_out_of_memory_where_they_meet_says_that():
    with pytest.raises(torch.OutOfMemoryError), ranks.meeting():
        raise torch.OutOfMemoryError


def test_one_process_has_nothing_to_share():
    assert divide(TRAIN) is TRAIN
    assert pool(TRAIN) is TRAIN


# The command


def said(errors):
    """What our own processes said, without torchrun's report."""
    return re.findall(r"^(?:python -m|This process|Stopped|Interrupted).*", errors, re.MULTILINE)


def test_torchrun_runs_the_command_and_the_first_rank_alone_logs_and_prints(commands):
    ended, uri = commands
    status, printed, errors = ended["well"]
    assert (status, said(errors)) == (0, []), errors
    assert "Traceback" not in errors
    assert printed.count("Conv2d") == 4  # of two networks
    assert len(re.findall(r"^(trained|pruned|fine-tuned) ", printed, re.MULTILINE)) == 3
    assert printed.count("MLflow run ") == 1
    names = [run.info.run_name for run in runs(uri) if run.info.status == "FINISHED"]
    assert names.count("train") == 2  # of this command, and of the one that ends badly
    assert names.count("fine-tune") == 1


def test_a_rank_that_dies_ends_the_command_with_one_sentence(commands):
    status, printed, errors = commands[0]["badly"]
    assert status == 1
    assert len(said(errors)) == 1, errors
    assert re.search("other ranks|another process", said(errors)[0])
    assert "MLflow run " not in printed


def test_without_the_store_of_torchrun_every_rank_says_why_it_stops(monkeypatch, capsys):
    def gone(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "TCPStore", gone)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    before = signal.getsignal(signal.SIGTERM)
    try:
        ranks.say("why")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "why\n"


def test_of_several_ranks_one_says_why_they_stop(monkeypatch, capsys):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (place | {"TORCHELASTIC_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for message in ("first", "second"):
            ranks.say(message)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.splitlines() == ["first"]
