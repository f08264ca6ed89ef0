"""Which processes of this machine are alive, known by the locks they hold, and how they are ended.

The system frees the locks of a process, however it dies. So a file whose lock is free belongs to
a dead one, and two that live never take each other for dead.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cnn_pruning.experiments.paths import locked_folder


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``KeyboardInterrupt``, with their number, as long as the block runs.

    They stay as they are where they are ignored (``nohup``) or handled already, and outside the
    main thread, where Python allows no change.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    with ExitStack() as afterwards:
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows
                if signal.getsignal(number) == signal.SIG_DFL:
                    afterwards.callback(signal.signal, number, signal.SIG_DFL)
                    signal.signal(number, interrupt)
        yield


def alone(folder: Path) -> AbstractContextManager[None]:
    """Only one process at a time is in this block and looks at who in ``folder`` is alive."""
    return locked_folder(folder, "all.lock")


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
