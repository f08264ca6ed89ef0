"""A few of the random chains of ``random_chains.py``."""

import pytest
from random_chains import check


@pytest.mark.parametrize("seed", range(16))
def test_what_must_hold_for_every_chain(seed):
    # float64 and networks of a few layers: rounding stays below
    assert all(difference < 1e-12 for difference in check(seed).values())
