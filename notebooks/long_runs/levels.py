"""The levels of the game "Beat Taylor", from the tables of every_network.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from long_runs import every_network as every

import numpy as np
import pandas as pd

Place = tuple[int, int]
"""A filter: 0 for the first layer or 1 for the second, and its number there."""

TAYLOR = "taylor, normalized"  # the method of the tutorial
ROUNDING = 5e-6  # nats; closer losses count as equal


@dataclass(frozen=True)
class Ranks:
    """The losses at some ranks, best first, among ``of`` networks."""

    of: int
    ranks: Sequence[int]
    losses: Sequence[float]

    def rank(self, loss: float) -> tuple[int, bool]:
        """Return the rank of a network with this loss, and whether it is exact or interpolated."""
        losses, ranks = np.asarray(self.losses), np.asarray(self.ranks)
        better = int((losses < loss - ROUNDING).sum())
        if better == len(ranks):
            return self.of, True
        if ranks[better] == better + 1:  # every rank up to here is stored
            return better + 1, True
        around = slice(better - 1, better + 1)  # and no further, since many losses can be equal
        between = np.interp(loss, losses[around], np.log(ranks[around]))
        return int(np.clip(np.exp(between).round(), ranks[better - 1] + 1, self.of)), False


@dataclass(frozen=True)
class Rivals:
    """All networks that one is compared with, and what Taylor and the table keep among them."""

    who: str
    ranks: Ranks
    taylor: set[Place]
    taylor_loss: float
    best: set[Place]

    @property
    def best_loss(self) -> float:
        return min(self.ranks.losses)


@dataclass(frozen=True)
class Level:
    """What to reach: so many filters, or at most so many multiply-adds; perhaps in a few clicks."""

    name: str
    rivals: Rivals
    size: int | None = None
    macs: int | None = None
    clicks: int | None = None

    def missing(self, first: int, second: int) -> str:
        """Say why a network with these widths can't compete; nothing if it can."""
        if not first or not second:
            return "A layer is empty."
        if self.macs is not None:
            share = every.macs_of(first, second) / every.macs_of(*every.CHANNELS)
            most = self.macs / every.macs_of(*every.CHANNELS)
            over = every.macs_of(first, second) > self.macs
            return (
                f"{share:.1%} of the multiply-adds are left, at most {most:.0%} may."
                if over
                else ""
            )
        more = first + second - self.size
        if more > 0:
            return f"{more} more must go."
        return f"{-more} too many are off." if more else ""


def levels(seed: int = 0) -> tuple[dict[int, Rivals], list[Level]]:
    """Return the rivals of a network by its number of filters, and the levels.

    ``seed`` is that of one of the networks of ``every_network.SEEDS``.
    """
    pairs, ladder, choices = (
        table[table.seed == seed].dropna()
        for table in (
            pd.read_csv(path, comment="#") for path in (every.PAIRS, every.SIZES, every.CHOICES)
        )
    )
    pairs = pairs[(pairs["first"] > 0) & (pairs.second > 0)]
    taylor = choices[choices.method == TAYLOR].set_index("size")
    best = choices[choices.method == "optimum"].set_index("size")
    by_size = {
        size: Rivals(
            f"with {size} filters",
            Ranks(rows["of"].iloc[0], rows["rank"].tolist(), rows.loss.tolist()),
            _kept(taylor.subset[size]),
            taylor.loss[size],
            _kept(best.subset[size]),
        )
        for size, rows in ladder.groupby("size")
    }
    half = every.macs_of(*every.CHANNELS) // 2
    found = [
        Level("keep 12 of 24", by_size[12], 12),
        Level("keep 20 of 24", by_size[20], 20),
        Level("keep 6 of 24", by_size[6], 6),
        Level("keep 8, within 30 clicks", by_size[8], 8, clicks=30),
        Level("half of the multiply-adds", within(half, pairs, taylor), macs=half),
    ]
    return by_size, found


def within(most: int, pairs: pd.DataFrame, taylor: pd.DataFrame) -> Rivals:
    """All networks with at most ``most`` multiply-adds, from the quantiles of each pair of widths.

    Only the first rank is exact. Taylor's is the largest network on its way down that is small
    enough.
    """
    pairs = pairs[every.macs_of(pairs["first"], pairs.second) <= most]
    at = pairs.loc[:, "0%":"100%"].to_numpy()
    shares = np.asarray(every.PERCENT) / 100
    losses = np.unique(at)
    ranks = np.zeros(len(losses))
    for row, count in zip(at, pairs.networks, strict=True):
        among = np.exp(np.interp(losses, row, np.log1p(shares * (count - 1))))
        ranks += np.where(losses < row[0], 0, among)
    ranks = ranks.round().astype(int)
    stored = np.searchsorted(ranks, every.stored_ranks(ranks[-1]))
    stored = np.unique(stored)
    small = [name for name in taylor.subset if every.macs_of(*every.shape_of(name)) <= most]
    chosen = taylor[taylor.subset.isin(small)].sort_index().iloc[-1]
    return Rivals(
        f"with at most {most / every.macs_of(*every.CHANNELS):.0%} of the multiply-adds",
        Ranks(int(ranks[-1]), ranks[stored].tolist(), losses[stored].tolist()),
        _kept(chosen.subset),
        chosen.loss,
        _kept(pairs.best[pairs["0%"].idxmin()]),
    )


def _kept(subset: str) -> set[Place]:
    by_layer = every.kept_of(every.number(subset)).values()
    return {(i, k) for i, kept in enumerate(by_layer) for k in kept}
