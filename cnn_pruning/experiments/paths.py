"""Where the repository keeps its data and runs, and folders for one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

_checkout = Path(__file__).resolve().parents[2]

ROOT = _checkout if (_checkout / "pyproject.toml").exists() else Path.cwd()
"""The repository's root; the current folder where the package was installed without a checkout."""


@contextmanager
def locked_folder(folder: Path, name: str) -> Iterator[None]:
    """Make ``folder``, and let one process at a time into the block, by a lock called ``name``.

    If the block raises, the folder and those above it are removed if they are new and empty.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / name)
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
