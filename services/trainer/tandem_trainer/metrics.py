"""What a run writes about itself: one JSON object a line, one line a step."""

from __future__ import annotations

import errno
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.version import Version

from .batch import ScoredGroup


class Sample(NamedTuple):
    """One completion in figures, small enough to travel between ranks."""

    reward: float | None
    rewards_by_function: tuple[float | None, ...]
    tokens: int
    truncated: bool
    lag: int


def samples(groups: Iterable[ScoredGroup], step: int) -> list[Sample]:
    """Of the groups that were trained on at version `step`."""
    return [
        Sample(
            reward=group.rewards[i],
            rewards_by_function=tuple(column[i] for column in group.rewards_by_function.values()),
            tokens=len(completion.token_ids),
            truncated=completion.finish_reason == "length",
            lag=step - min((span.version.step for span in completion.versions), default=step),
        )
        for group in groups
        for i, completion in enumerate(group.group.completions)
    ]


def step_record(
    version: Version,
    rows: Sequence[Sample],
    stats: Mapping[str, float],
    *,
    functions: Sequence[str],
    groups_skipped: int,
) -> dict[str, Any]:
    """One line of `metrics.jsonl`. `kl_sampler` is the k3 estimate of KL(sampler ‖ trainer), a mean over tokens."""
    rewards = [row.reward for row in rows]
    columns = list(zip(*(row.rewards_by_function for row in rows), strict=True))
    tokens = sum(row.tokens for row in rows)
    return {
        "step": version.step,
        "version": str(version),
        "reward_mean": mean(rewards),
        "reward_std": std(rewards),
        "rewards": {name: mean(column) for name, column in zip(functions, columns, strict=True)},
        "rewards_std": {name: std(column) for name, column in zip(functions, columns, strict=True)},
        "mismatch": None,
        **stats,
        "lag_max": max(row.lag for row in rows),
        "completion_tokens_mean": tokens / len(rows),
        "truncated_fraction": sum(row.truncated for row in rows) / len(rows),
        "rollout_tokens": tokens,
        "groups_skipped": groups_skipped,
    }


def completion_records(
    version: Version, groups: Sequence[ScoredGroup], count: int, *, skipped: bool = False
) -> list[dict[str, Any]]:
    """The first `count` completions with their rewards, one of each group before a second of any.

    Args:
        version: the one that was learned from them, or that was going to be if they are `skipped`.
        skipped: nothing was learned from any of them. Of other groups, those with equal rewards are skipped.
    """
    pairs = [(group, i) for i in range(len(groups[0].texts)) for group in groups]
    return [
        {
            "step": version.step,
            "skipped": skipped or not group.has_signal,
            "row": group.row,
            "prompt": group.prompt_text,
            "completion": group.texts[i],
            "reward": group.rewards[i],
            "rewards": {name: column[i] for name, column in group.rewards_by_function.items()},
            "finish_reason": group.group.completions[i].finish_reason,
            "versions": [str(span.version) for span in group.group.completions[i].versions],
        }
        for group, i in pairs[:count]
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def std(values: Iterable[float | None]) -> float | None:
    """Of those that are not None, as a whole population; None without any."""
    known = [value for value in values if value is not None]
    return statistics.pstdev(known) if known else None


class JsonLinesWriter:
    """A file of one JSON object a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines at the end: all of them or, if an error occurs, none. NaN and infinity become null, as JSON has it.

        Raises:
            OSError: such as ENOSPC when the disk is full.
        """
        data = "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records).encode()
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):  # the disk became full on the way
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> Iterator[dict[str, Any]]:
        """Every whole line."""
        if self._path.exists():
            with self._path.open() as file:
                for line in file:
                    with suppress(json.JSONDecodeError):  # a crash has cut it short
                        yield json.loads(line)

    def last_step(self) -> int:
        """-1 without any."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else -1

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run computes again, and a last line that a crash cut short."""
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step(line) <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self._path)


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return float("inf")
