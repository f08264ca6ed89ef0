"""Times of functions that take turns, in one process, and what else the machine did meanwhile."""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import psutil
import torch

Times = dict[str, list[float]]

QUIET = 0.1  # cores that other programs may keep busy


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Return the seconds that each function takes, ``repeats`` times, after one that isn't counted.

    They take turns, so that what else the machine does slows all of them alike. Each starts
    without the memory that the one before left behind, and Python collects garbage in between.
    """
    times: Times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        print(f"turn {turn} of {repeats}: {', '.join(functions)}", file=sys.stderr)
        gc.collect()
        for name, function in functions.items():
            give_back()
            start = clock()
            function()
            if turn:
                times[name].append(clock() - start)
    return times


def give_back() -> None:
    """Let glibc give freed memory back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def against(name: str, times: Times) -> dict[str, str]:
    """Return, by column, the medians with their ranges, and the ratios of the others to ``name``.

    The ratio is the median over the turns. Above 1, ``name`` is faster.
    """
    columns = {f"{other} (s)": spread(seconds) for other, seconds in times.items()}
    for other, seconds in times.items():
        if other != name:
            ratios = [a / b for a, b in zip(seconds, times[name], strict=True)]
            columns[f"{other} / {name}"] = f"{statistics.median(ratios):.2f}"
    return columns


def spread(values: list[float]) -> str:
    """The median, and the lowest and the highest value."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def markdown(rows: list[dict[str, str]]) -> str:
    """``rows`` as a markdown table, with an empty cell for what a row doesn't have."""
    table = pd.DataFrame(rows).fillna("")
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--processor-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="count the processor's seconds: of use where other programs run, with one thread",
    )


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = torch.backends.cpu.get_cpu_capability()
    bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return (
        f"{platform.machine()} with {features}, {'with' if bfloat16 else 'without'} bfloat16 "
        f"instructions, {cores} cores; PyTorch {torch.__version__.split('+')[0]} with "
        f"{torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}."
    )


@contextmanager
def watched() -> Iterator[None]:
    """Print before the block what the machine is, and behind it what else it did meanwhile."""
    before, others, start = os.getloadavg()[0], _of_others(), time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    cores = max(0.0, (_of_others() - others) / seconds)
    verdict = "quiet" if cores < QUIET else "NOT quiet"
    print(
        f"{machine()} The machine was {verdict}: in these {seconds:.0f} s, other programs kept "
        f"{cores:.2f} cores busy (load before: {before:.1f}).\n"
    )


def _of_others() -> float:
    """The seconds of processor time that other programs have taken since the system started."""
    every, own = psutil.cpu_times(), os.times()
    busy = sum(every) - every.idle - getattr(every, "iowait", 0)
    busy -= getattr(every, "guest", 0) + getattr(every, "guest_nice", 0)  # in user and nice already
    return busy - sum(own[:4])  # with the children that have ended
