"""What the long runs share: their arguments, and tables that only a whole run replaces."""

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
