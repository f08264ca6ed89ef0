"""The benchmarks run, on tiny settings; what they measure isn't asserted."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch

from cnn_pruning.experiments.paths import ROOT

FOLDER = ROOT / "tests" / "benchmarks"


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_functions_take_turns_and_the_first_turn_is_not_counted():
    import measuring

    calls = []
    times = measuring.in_turns({name: lambda n=name: calls.append(n) for name in "ab"}, 2)
    assert calls == [*"ababab"]
    assert [len(times[name]) for name in "ab"] == [2, 2]
    assert measuring.against("a", {"a": [1.0, 2.0, 4.0], "b": [3.0, 2.0, 8.0]})["b / a"] == "2.00"


def test_a_program_beside_it_makes_the_machine_not_quiet(capsys):
    import measuring

    busy = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", busy])
    try:
        time.sleep(0.2)
        with measuring.watched():
            time.sleep(1)
    finally:
        other.wait()
    assert "NOT quiet" in capsys.readouterr().out


def test_what_speed_compares_does_the_same():
    import reference
    import speed
    from torch.utils.data import TensorDataset

    _, _, test = speed.splits()
    data, model = TensorDataset(*test[:96]), speed.network()
    assert speed.evaluate(model, data) == pytest.approx(speed.plain_evaluation(model, data, 32))
    few = TensorDataset(*test[:8])
    plain = speed.plain_oracle(model, few)
    for layer, changes in speed.oracle(model, few).items():
        assert changes.tolist() == pytest.approx(plain[layer], abs=1e-6)
    scores = reference.scores(model.network, data)
    for ours, theirs in zip(speed.filter_scores(model, data).values(), scores, strict=True):
        torch.testing.assert_close(ours, theirs / len(data))


def test_speed_prints_a_table_for_each_part(capsys):
    import speed

    parts = ["scoring", "evaluation", "oracle", "training"]
    options = "--images 64 --batch-sizes 32 --repeats 1 --threads 1"
    speed.main([*parts, *options.split()])
    printed = capsys.readouterr().out
    assert printed.count("\n## ") + printed.startswith("## ") == len(parts)
    assert printed.count("\n| --- ") == printed.count("1 thread.") == len(parts)


def test_size_draws_and_prints_its_slopes(tmp_path, capsys):
    import size

    options = "--images 32 64 --widths 2 4 --depths 2 3 --gmacs 0.01 --repeats 1 --threads 1"
    size.main([str(tmp_path / "size.png"), *options.split()])
    assert capsys.readouterr().out.count("| slope |") == 3
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")


def test_a_network_goes_through_all_steps():
    # By its path, because the tests have another module of this name.
    spec = importlib.util.spec_from_file_location("named_networks", FOLDER / "networks.py")
    named = sys.modules["named_networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(named)
    row = named.row_of("CIFAR-10 tutorial")
    assert set(row) >= set(named.STEPS)
    assert not any("FAILED" in cell or "WRONG" in cell for cell in row.values())
    assert "1 were cut exactly" in named.counts([row])


def test_memory_counts_all_processes(tmp_path):
    import memory

    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "execution_count": None,
                "id": "only",
                "metadata": {},
                "outputs": [],
                "source": "held = bytearray(300_000_000)\nimport time; time.sleep(0.5)",
            }
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path = tmp_path / "held.ipynb"
    path.write_text(json.dumps(notebook))
    (together, largest), _ = memory.run(path, str(tmp_path))
    assert together > largest > 300e6
