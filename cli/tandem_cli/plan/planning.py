"""Compare the ways to divide a number of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .costs import Costs
from .simulation import Result, Split, simulate

BALANCED = 0.1
TIE = 1.05
"""A row that takes at most this many times as long as the fastest is as good."""


class Row(NamedTuple):
    split: Split
    result: Result

    @property
    def trainer_busy(self) -> float:
        """Share of the time in which the trainer learns."""
        return self.result.update_s / self.result.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.result.tokens / self.result.step_s


def splits(costs: Costs, devices: int, per_replica: int, lags: Sequence[int]) -> Iterator[Split]:
    """Yield the ways to divide `devices`. Trainer devices must divide the groups of a step."""
    for lag in lags:
        for trainers in range(1, devices - per_replica + 1):
            if costs.num_prompts % trainers == 0:
                yield Split((devices - trainers) // per_replica, trainers, lag)


def compare(costs: Costs, devices: int, per_replica: int, lags: Sequence[int]) -> list[Row]:
    """Simulate all splits."""
    return [Row(split, simulate(costs, split)) for split in splits(costs, devices, per_replica, lags)]


def best(rows: Sequence[Row]) -> Row:
    """Return the fastest row. Of rows that are as fast, the one with the smallest lag."""
    fastest_s = min(row.result.step_s for row in rows)
    good = [row for row in rows if row.result.step_s <= TIE * fastest_s]
    return min(good, key=lambda row: (row.split.max_lag, row.result.step_s))


def reason(row: Row, rows: Sequence[Row]) -> str:
    """Say what limits the best split, and what others would take."""
    others = [one for one in rows if one.split[:2] != row.split[:2] and one.split.max_lag == row.split.max_lag]
    sentences = [f"A step takes {row.result.step_s:.3g} s. {_limit(row)}."]
    if others:
        second = min(others, key=lambda one: one.result.step_s)
        sentences.append(f"{words(second.split)} would take {second.result.step_s:.3g} s.")
    lags = sorted({one.split.max_lag for one in rows} - {row.split.max_lag})
    for one in (best([one for one in rows if one.split.max_lag == lag]) for lag in lags):
        sentences.append(
            f"With max_lag {one.split.max_lag}, the best is {words(one.split)}: {one.result.step_s:.3g} s."
        )
    return " ".join(sentences)


def _limit(row: Row) -> str:
    """Say which side limits the speed of a split."""
    wait, busy = row.result.wait_s / row.result.step_s, row.result.generators_busy
    if row.split.max_lag == 0:
        return "With max_lag 0, the two sides take turns"
    if wait > BALANCED:
        return f"The generators limit the speed: the trainer waits for {wait:.0%} of the time"
    if busy < 1 - BALANCED:
        return f"The trainer limits the speed: generators decode for {busy:.0%} of the time"
    return "Both sides are busy"


def words(split: Split) -> str:
    """`1 generator and 2 trainer devices`."""
    return f"{_count(split.replicas, 'generator')} and {_count(split.trainer_devices, 'trainer device')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
