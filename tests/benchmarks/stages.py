"""``python -m cnn_pruning`` as it is, and how many seconds each of its stages takes.

    python tests/benchmarks/stages.py SEED EPOCHS

The last line is JSON: the seconds by stage, and the accuracy at the end.
"""

import json
import sys
import time
from collections.abc import Callable

START = time.perf_counter()

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
    seconds = {"imports": time.perf_counter() - START}
    accuracies = []

    def timed(stage: str, function: Callable) -> Callable:
        def call(*arguments, **named):
            start = time.perf_counter()
            result = function(*arguments, **named)
            seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - start
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
    rest = time.perf_counter() - START - sum(seconds.values())
    print(json.dumps({"accuracy": accuracies[-1]} | seconds | {"MLflow and the rest": rest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
