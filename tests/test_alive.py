"""Locks of the living and the dead, signals, deadlines and folders: without a store."""

import os
import signal
import sys
import threading
import time
import weakref

import pytest
from filelock import FileLock, Timeout

from cnn_pruning.experiments import paths
from cnn_pruning.experiments.alive import (
    STOPS,
    TooLate,
    alone,
    deadline,
    held,
    signals_interrupt,
    the_dead,
    undisturbed,
)

ERRORS = [ValueError, KeyboardInterrupt]


def handlers():
    numbers = sorted({signal.SIGINT, signal.SIGALRM, *STOPS})
    return [signal.getsignal(number) for number in numbers], sys.unraisablehook


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def dead(folder):
    with alone(folder):
        return sorted(the_dead(folder))


def test_who_holds_a_lock_is_alive_and_who_has_left_is_forgotten(tmp_path):
    with held(tmp_path, "1.one"), held(tmp_path, "1.other"):
        assert dead(tmp_path) == []
        with pytest.raises(Timeout):
            FileLock(tmp_path / "1.one.alive").acquire(timeout=0)
    assert dead(tmp_path) == []
    assert not list(tmp_path.glob("*.alive"))


@pytest.mark.parametrize("error", ERRORS)
def test_a_block_that_raises_leaves_its_name_among_the_dead_once(tmp_path, error):
    with pytest.raises(error), held(tmp_path, "1.one"):
        raise error
    (tmp_path / "1.old.alive").touch()
    (tmp_path / "network.pt").touch()
    with held(tmp_path, "1.living"):
        assert dead(tmp_path) == ["1.old", "1.one"]
        assert dead(tmp_path) == []
        assert (tmp_path / "1.living.alive").exists()
    assert (tmp_path / "network.pt").exists()


def test_a_dead_one_stays_if_whoever_looks_at_it_fails(tmp_path):
    (tmp_path / "1.old.alive").touch()
    with pytest.raises(ValueError), alone(tmp_path):
        for _ in the_dead(tmp_path):
            raise ValueError
    assert dead(tmp_path) == ["1.old"]


def test_who_looks_at_the_dead_may_clear_up(tmp_path):
    for name in ("1.old", "1.older"):
        (tmp_path / f"{name}.alive").touch()
    with alone(tmp_path):
        for name in the_dead(tmp_path):
            (tmp_path / f"{name}.alive").unlink()
    assert files(tmp_path) == ["all.lock"]


def test_nobody_looks_at_the_dead_while_another_does(tmp_path):
    with alone(tmp_path), pytest.raises(Timeout):
        FileLock(tmp_path / "all.lock").acquire(timeout=0)


@pytest.mark.parametrize("error", ERRORS)
def test_a_new_folder_goes_if_its_block_raises_and_an_old_one_stays_with_its_lock(tmp_path, error):
    with pytest.raises(error), alone(tmp_path / "a" / "b"):
        assert files(tmp_path) == ["a", "a/b", "a/b/all.lock"]
        raise error
    assert files(tmp_path) == []
    with alone(tmp_path / "a"):
        pass
    before = files(tmp_path)
    with pytest.raises(error), alone(tmp_path / "a"):
        raise error
    assert files(tmp_path) == before == ["a", "a/all.lock"]
    with pytest.raises(error), alone(tmp_path / "new"):
        (tmp_path / "new" / "kept").touch()
        raise error
    assert files(tmp_path) == ["a", "a/all.lock", "new", "new/kept"]
    with pytest.raises(error), alone(tmp_path / "a" / "b"):
        raise error
    assert files(tmp_path) == ["a", "a/all.lock", "new", "new/kept"]


def test_no_file_stays_open(tmp_path):
    def used():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no list of open files")
    before = used()
    for number in range(5):
        with held(tmp_path, f"1.{number}"):
            dead(tmp_path)
        with pytest.raises(ValueError), held(tmp_path, f"2.{number}"):
            raise ValueError
        with pytest.raises(ValueError), alone(tmp_path / "new"):
            raise ValueError
    dead(tmp_path)
    assert used() == before


def test_the_root_is_the_folder_of_the_project_or_where_one_works(tmp_path, monkeypatch):
    place = tmp_path / "lib" / "cnn_pruning" / "experiments" / "paths.py"
    place.parent.mkdir(parents=True)
    source = open(paths.__file__).read()
    for checkout in (False, True):
        if checkout:
            (tmp_path / "lib" / "pyproject.toml").touch()
        monkeypatch.chdir(tmp_path)
        found = {"__file__": str(place), "__name__": "paths"}
        exec(compile(source, str(place), "exec"), found)
        assert found["ROOT"] == (tmp_path / "lib" if checkout else tmp_path)


# Signals


@pytest.mark.parametrize("number", sorted(STOPS))
def test_a_signal_is_an_interrupt_with_its_number_in_the_block_only(number):
    before = handlers()
    with pytest.raises(KeyboardInterrupt) as raised, signals_interrupt():
        signal.raise_signal(number)
    assert raised.value.args == (number,)
    with signals_interrupt(), signals_interrupt():
        pass
    assert handlers() == before


def test_what_is_handled_or_ignored_stays_so():
    number, before = next(iter(STOPS)), handlers()
    for handler in (signal.SIG_IGN, lambda *_: None):
        old = signal.signal(number, handler)
        try:
            with signals_interrupt():
                assert signal.getsignal(number) == handler
                signal.raise_signal(number)
        finally:
            signal.signal(number, old)
    assert handlers() == before


@pytest.mark.parametrize("error", [None, *ERRORS])
def test_nothing_disturbs_a_block_and_all_is_as_it_was_after_it(error):
    before = handlers()
    try:
        with undisturbed():
            for number in {signal.SIGINT, *STOPS}:
                signal.raise_signal(number)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error and not raised.args
    assert handlers() == before


def test_other_threads_leave_the_signals_alone():
    before, found = handlers(), []

    def work():
        with signals_interrupt(), undisturbed(), deadline(60):
            found.append((handlers(), signal.getitimer(signal.ITIMER_REAL)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, (0.0, 0.0))]


# Deadlines


def test_a_deadline_ends_what_takes_longer_and_comes_again():
    before, ended = handlers(), 0
    with pytest.raises(TooLate, match="longer than 0 seconds"), deadline(0.05):
        try:
            time.sleep(30)
        except TooLate:  # as a library may do, which tries once more
            ended = 1
            time.sleep(30)
    assert ended == 1
    assert handlers() == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_in_time_leaves_no_alarm(error):
    before = handlers()
    with deadline(60):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 1
    with pytest.raises(error), deadline(60):
        raise error
    assert handlers() == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_alarm_of_another_is_left_to_it():
    rang = []
    old = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with deadline(60):
            while not rang:
                time.sleep(0.01)
        with deadline(60), deadline(1):  # the outer one holds
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Thing:
    """What can have a weak reference."""


def test_an_interrupt_that_python_ignores_comes_again_where_its_signal_is_ignored_since():
    def once(number, frame):
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, once)
    try:
        with pytest.raises(KeyboardInterrupt), signals_interrupt():
            thing = Thing()
            reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            del thing
            assert reference() is None
            for _ in range(200):
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
