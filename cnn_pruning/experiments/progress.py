"""A progress bar, in a notebook and in a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from cnn_pruning.experiments.ranks import is_first


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` steps for as long as the block runs; yield the function that
    advances it by one.

    In a notebook the bar is plain HTML and ends as one line of text, so that a saved notebook
    holds neither a dead widget nor half a bar. Elsewhere it is tqdm's, shown in terminals only, and
    of several ranks by the first.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if not hasattr(shell, "kernel"):
        with tqdm(total=total, desc=label, leave=False, disable=not is_first() or None) as bar:
            yield bar.update
        return

    from IPython.display import HTML, display

    start = shown = time.perf_counter()
    done = 0

    def show(what: str) -> None:
        handle.update(HTML(f"{label}: {what}"))

    def advance() -> None:
        nonlocal done, shown
        done += 1
        if time.perf_counter() - shown > 0.2:
            shown = time.perf_counter()
            show(f"<progress max='{total}' value='{done}' style='width: 20em'></progress>")

    handle = display(HTML(label), display_id=True)
    try:
        yield advance
    except BaseException:
        show(f"stopped at step {done} of {total}")
        raise
    show(f"{time.perf_counter() - start:.1f} s")
