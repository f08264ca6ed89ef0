"""Which processes of this machine are alive, known by the locks they hold, and how they are ended.

The system frees the locks of a process, however it dies. So a file whose lock is free belongs to
a dead one, and two that live never take each other for dead.
"""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from unittest import mock

from filelock import FileLock, Timeout

STOPS = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP


class TooLate(Exception):
    """What ``deadline`` raises. Not an ``OSError``, after which urllib3 would try once more."""


def _in_main_thread() -> bool:
    """Elsewhere, Python allows no change of what signals do."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def interrupts_come_again() -> Iterator[None]:
    """An interrupt that Python ignores, because it comes while an object is deleted, comes again.

    Outside the main thread, nothing is done.
    """

    def come_again(ignored: object) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            before(ignored)
            return
        number = (getattr(ignored.exc_value, "args", None) or [signal.SIGINT])[0]
        if signal.getsignal(number) == signal.SIG_IGN:  # since ``ranks.say``
            number = signal.SIGINT
        threading.Timer(0.05, _thread.interrupt_main, [number]).start()

    before, here = sys.unraisablehook, _in_main_thread()
    with mock.patch.object(sys, "unraisablehook", come_again) if here else nullcontext():
        yield


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``KeyboardInterrupt``, with their number, as long as the block runs.

    They stay as they are where they are ignored (``nohup``) or handled already, and outside the
    main thread. Interrupts come again where Python ignores them.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    with ExitStack() as afterwards, interrupts_come_again():
        for number in STOPS if _in_main_thread() else ():
            if signal.getsignal(number) == signal.SIG_DFL:
                afterwards.callback(signal.signal, number, signal.SIG_DFL)
                signal.signal(number, interrupt)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP do nothing in this block, which must be short."""
    with ExitStack() as afterwards:
        for number in {signal.SIGINT, *STOPS} if _in_main_thread() else ():
            before = signal.signal(number, signal.SIG_IGN)
            afterwards.callback(signal.signal, number, before or signal.SIG_DFL)
        yield


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise ``TooLate`` in the block after so many seconds, and once more each second.

    A server that sends a byte now and then keeps each read within its time, but not the whole. This
    takes a system with SIGALRM, the main thread, and that no other alarm is set; else there is no
    deadline.
    """

    def late(number: int, frame: object) -> None:
        raise TooLate(f"it took longer than {seconds:.0f} seconds")

    possible = _in_main_thread() and hasattr(signal, "setitimer")
    if not possible or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time is in this block and looks at who in ``folder`` is alive.

    ``folder`` is made. If the block raises, it and those above it are removed if they are new and
    empty.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / "all.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            yield
    except BaseException:
        with suppress(OSError):
            if new:
                Path(lock.lock_file).unlink(missing_ok=True)
            for each in new:
                each.rmdir()
        raise


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Say by a lock in ``folder`` that the owner of ``name`` is alive, as long as the block runs.

    If the block raises, ``name`` stays among the dead, to be looked at once more.
    """
    lock = FileLock(folder / f"{name}.alive")
    with ExitStack() as until_it_ends:
        with alone(folder):  # nobody may find the file before it is locked
            until_it_ends.enter_context(lock)
        yield
    Path(lock.lock_file).unlink(missing_ok=True)


def the_dead(folder: Path) -> Iterator[str]:
    """Yield the names in ``folder`` that nobody alive holds. Call it ``alone``.

    Each is forgotten when the next is asked for.
    """
    for path in folder.glob("*.alive"):
        with suppress(Timeout):
            with FileLock(path, timeout=0):
                yield path.stem
            path.unlink(missing_ok=True)
