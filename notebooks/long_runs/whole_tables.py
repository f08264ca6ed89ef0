"""What the long runs share: their arguments, rows that are kept as they are done, and tables that
only a whole run replaces."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).resolve().parent
"""The programs, and the tables of their documented runs."""

MARK = "# settings: "


def arguments(
    text: str, documented: Sequence[int], given: Sequence[str] | None = None
) -> tuple[list[int], Path]:
    """Return the seeds and the folder that the command line asks for.

    Without arguments these are the seeds of the documented run and the folder of its tables.
    ``given`` is the command line, without the program's name (that of this process, if None).

    Ends the program, with one sentence, for what isn't a seed, and for other seeds than the
    documented ones without a folder of their own.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = " ".join(map(str, documented))
    parser.add_argument("seeds", nargs="*", type=_seed, help=f"one or more; by default {shown}")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the tables go; by default beside this"
    )
    options = parser.parse_args(given)
    seeds = sorted(options.seeds or documented)
    folder = (options.out or FOLDER).resolve()
    if len({*seeds}) < len(seeds):
        parser.error(f"name each seed once, not {' '.join(map(str, options.seeds))}")
    if folder == FOLDER and seeds != sorted(documented):
        parser.error(f"the tables here are those of seeds {shown}: name another folder with --out")
    try:  # now, and not after hours
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{options.out} can't be a folder for the tables ({error.strerror})")
    return seeds, folder


def _seed(word: str) -> int:
    if not word.isascii() or not word.isdigit():
        raise argparse.ArgumentTypeError(f"a seed is an integer of 0 or more, not {word!r}")
    return int(word)


class Rows:
    """The rows of one seed, in a file that grows with each of them: a run that was stopped goes on.

    The file's first line has the settings. A last line that was cut off is dropped.

    Raises ``ValueError`` if the file there has other settings.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path, self.rows = path, []
        first = json.dumps(settings)
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole and whole[0].strip() != first:
            raise ValueError(
                f"{path} has rows of other settings: remove it, or name another folder with --out."
            )
        self.rows = [json.loads(line) for line in whole[1:]]
        if len(whole) < len(lines) or not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(whole) or first + "\n", encoding="utf-8")

    def has(self, **labels: object) -> bool:
        return any(labels.items() <= row.items() for row in self.rows)

    def add(self, row: dict) -> None:
        """Keep ``row``, on the disk when this returns."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write(tables: dict[Path, list[dict]], settings: dict) -> None:
    """Write the rows of each table, with ``settings`` in its first line, if all are whole.

    Each is written beside its place first, so that a table is replaced at once or not at all.
    Readers skip the first line: ``pd.read_csv(path, comment="#")``.

    Raises ``ValueError`` if a table lacks one of ``settings["seeds"]``, or some of its rows.
    """
    for path, rows in tables.items():
        counts = {seed: sum(row["seed"] == seed for row in rows) for seed in settings["seeds"]}
        if not counts or min(counts.values()) == 0 or len({*counts.values()}) > 1:
            raise ValueError(f"{path.name} isn't whole: its rows by seed are {counts}.")
    beside = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in tables}
    try:
        for path, rows in tables.items():
            with beside[path].open("w", encoding="utf-8", newline="") as file:
                file.write(f"{MARK}{json.dumps(settings)}\n")
                pd.DataFrame(rows).to_csv(file, index=False, lineterminator="\n")
        for path, part in beside.items():
            os.replace(part, path)
    finally:
        for part in beside.values():
            part.unlink(missing_ok=True)


def read_settings(path: Path) -> dict:
    """Return the settings in the first line of a table."""
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline().removeprefix(MARK))
