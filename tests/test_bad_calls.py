"""What is public answers wrong arguments in a sentence, soon, and without changing any of them."""

import signal

import bad_calls
import pytest
import torch
from bad_calls import PRUNER, Hang, Public, outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="calls are timed by SIGALRM"),
]


def test_random_bad_calls_end_in_a_sentence():
    ended = bad_calls.run(calls=100, seed=1)
    assert not [*ended.get("raw", []), *ended.get("hang", []), *ended.get("changed", [])]
    assert len(ended["documented"]) > 75


def changes(data):
    data.append(1)
    raise ValueError("This comes too late.")


def waits(data):
    next(data)
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "data", "expected"),
    [
        (lambda data: data.modules(), dict, "raw"),
        (lambda data: torch.rand(data), lambda: -1, "raw"),
        (changes, list, "changed"),
        (waits, bad_calls.endless, "hang"),
        (lambda data: list(data), bad_calls.endless, "hang"),
        (lambda data: torch.rand(1), list, "changed"),
        (PRUNER.score, lambda: 5, "documented"),
        (PRUNER.score, lambda: bad_calls.Items(bad_calls.fails), "own error"),
    ],
)
def test_the_fuzzer_tells_a_sentence_from_the_rest(call, data, expected, monkeypatch):
    monkeypatch.setattr(bad_calls, "SECONDS", 0.2)
    how, _ = outcome(Public(call, ("data",)), {"data": data})
    assert how == expected


def test_nothing_endless_is_read_to_its_end():
    with pytest.raises(Hang):
        list(bad_calls.endless())
    for public in bad_calls.PUBLIC:
        for name in (*public.needs, *public.takes):
            makers = {need: bad_calls.RIGHT[need][0] for need in public.needs}
            for wrong in (bad_calls.endless, bad_calls.EndlessItems):
                how, what = outcome(public, makers | {name: wrong})
                assert how in ("documented", "fine"), what
