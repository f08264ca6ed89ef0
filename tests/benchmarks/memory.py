"""How much memory each notebook needs, at its peak, when nbconvert runs it.

    python tests/benchmarks/memory.py                                 all notebooks
    python tests/benchmarks/memory.py notebooks/01_criterion.ipynb    one

Counted is the resident memory of nbconvert and of all processes that it starts, ten times a second.
The notebooks themselves stay as they are; what they log goes to a store that is new. Pages that two
processes share are counted twice.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LIMIT = 2000  # MB


def run(notebook: Path, folder: str) -> tuple[list[int], float]:
    """Run a notebook; return the peaks of all processes and of the largest, in bytes, and seconds.

    Raises ``RuntimeError`` if the notebook fails.
    """
    start = time.perf_counter()
    with (Path(folder) / "errors").open("w+") as errors:
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
        process = psutil.Popen(
            [*command, notebook.resolve(), "--output-dir", folder],
            env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        peaks = [0, 0]
        while process.poll() is None:
            sizes = [resident(each) for each in (process, *process.children(recursive=True))]
            peaks = [max(peaks[0], sum(sizes)), max(peaks[1], *sizes)]
            time.sleep(0.1)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{notebook.name} failed:\n{errors.read()}")
    return peaks, time.perf_counter() - start


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default, all")
    notebooks = parser.parse_args(arguments).notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    columns = "notebook", "all processes (MB)", "largest (MB)", "minutes", f"under {LIMIT:,} MB"
    for row in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(row)} |", flush=True)
    for notebook in notebooks:
        with tempfile.TemporaryDirectory() as folder:
            peaks, seconds = run(notebook, folder)
        together, largest = (peak / 1e6 for peak in peaks)
        row = (
            notebook.stem,
            f"{together:,.0f}",
            f"{largest:,.0f}",
            f"{seconds / 60:.1f}",
            "yes" if together < LIMIT else "NO",
        )
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
