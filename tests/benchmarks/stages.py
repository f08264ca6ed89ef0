"""``python -m cnn_pruning`` as it is, and how many seconds each of its stages takes.

    python tests/benchmarks/stages.py SEED EPOCHS [CLOCK]

CLOCK is ``perf_counter``, or ``process_time``. The last line is JSON: the seconds by stage, and the
accuracy at the end.
"""

import json
import sys
import time
from collections.abc import Callable

CLOCK = getattr(time, (sys.argv[3:] or ["perf_counter"])[0])
START = CLOCK()

import cnn_pruning.__main__ as program  # noqa: E402
from cnn_pruning import baseline, tracking  # noqa: E402

STAGES = {
    "the data": [(program, "fashion_mnist")],
    "a new store": [(tracking, "connect")],
    "training": [(baseline, "fit")],
    "evaluation": [(baseline, "evaluate"), (program, "evaluate")],
    "scoring": [(program, "filter_scores")],
    "the figure": [(program.plots, "score_bars"), (tracking, "log_figure")],
    "the final model to MLflow": [(tracking, "log_model")],
    "latency": [(program, "costs")],
}


def main(seed: str, epochs: str) -> None:
    seconds = {"imports": CLOCK() - START}
    accuracies = []

    def timed(stage: str, function: Callable) -> Callable:
        def call(*arguments, **named):
            start = CLOCK()
            result = function(*arguments, **named)
            seconds[stage] = seconds.get(stage, 0) + CLOCK() - start
            if stage == "evaluation":
                accuracies.append(result[1])
            return result

        return call

    for stage, places in STAGES.items():
        for module, name in places:
            setattr(module, name, timed(stage, getattr(module, name)))
    status = program.main(["--seed", seed, "--epochs", epochs, "--fine-tune-epochs", epochs])
    if status:
        raise SystemExit(status)
    print(json.dumps({"accuracy": accuracies[-1], "stages": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
