"""The records in `metrics.jsonl` and `rollouts.jsonl`, and the files of JSON lines that hold them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.version import Version
from tandem_rollout.dispatch import Loads
from tandem_rollout.trajectory import ChatMessage, Group

from .repetition import is_repetitive
from .token_log import NO_TOKENS, TokenLog

_STEP = re.compile(rb'\{"step": (\d{1,18}),')
"""The beginning of a line, as `JsonLinesWriter` writes it."""
_SHOWN_REASONS = 3
"""How many different reasons of failures a message names."""


class TrajectorySample(NamedTuple):
    """The numbers of one trajectory, small enough to be gathered over ranks."""

    reward: float | None
    rewards: dict[str, float | None]
    tokens: int
    """Number of sampled tokens."""
    truncated: bool
    staleness: dict[int, int]
    """Age in versions → number of sampled tokens."""
    turns: int = 1
    tool_calls: int = 0
    tool_errors: int = 0
    environment_s: float = 0.0
    is_repetitive: bool = False
    """Whether the completion repeats the same text again and again."""
    reason: str | None = None
    """Why the episode failed. None if it did not."""


def samples(groups: Iterable[Group], step: int) -> list[TrajectorySample]:
    """Return one sample per trajectory of the groups that were trained on at version `step`."""
    return [
        TrajectorySample(
            reward=one.reward,
            rewards=one.rewards,
            tokens=one.num_sampled,
            truncated=one.truncated,
            staleness=dict(one.staleness(step)),
            turns=one.turns,
            tool_calls=one.tool_calls,
            tool_errors=one.tool_errors,
            environment_s=one.timings.environment_s,
            is_repetitive=is_repetitive(as_text(one.completion)),
            reason=one.reason,
        )
        for group in groups
        for one in group.trajectories
    ]


def reward_names(functions: Iterable[str], rewards: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the functions, and those of the other rewards (from environments) in alphabetical order."""
    known = dict.fromkeys(functions)
    return [*known, *sorted({name for one in rewards for name in one} - known.keys())]


def step_record(
    version: Version,
    rows: Sequence[TrajectorySample],
    stats: Mapping[str, float],
    *,
    functions: Sequence[str],
    groups_skipped: int,
    has_episodes: bool = False,
) -> dict[str, Any]:
    """Make one line of `metrics.jsonl`.

    Args:
        version: the version that this step produced.
        rows: the trajectories of all ranks.
        stats: what `Learner.update` returned. Its `kl_sampler` is the k3 estimate of KL(sampler ‖ trainer), a mean
            over tokens.
        functions: names of the reward functions, or of the judge.
        has_episodes: whether to report turns and tools. Otherwise every trajectory is a single turn.
    """
    rewards = [row.reward for row in rows]
    names = reward_names(functions, (row.rewards for row in rows))
    columns = {name: [row.rewards.get(name) for row in rows] for name in names}
    tokens = sum(row.tokens for row in rows)
    return {
        "step": version.step,
        "version": str(version),
        "reward_mean": mean(rewards),
        "reward_std": std(rewards),
        "rewards": {name: mean(column) for name, column in columns.items()},
        "rewards_std": {name: std(column) for name, column in columns.items()},
        "mismatch": None,
        **stats,
        "lag_max": max(age for row in rows for age in (0, *row.staleness)),
        "staleness": _staleness(rows),
        "completion_tokens_mean": tokens / len(rows),
        "truncated_fraction": sum(row.truncated for row in rows) / len(rows),
        "repetitive_fraction": sum(row.is_repetitive for row in rows) / len(rows),
        **_without_rewards(rows, columns),
        "rollout_tokens": tokens,
        "groups_skipped": groups_skipped,
        **(_of_episodes(rows) if has_episodes else {}),
    }


def _without_rewards(rows: Sequence[TrajectorySample], columns: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """The shares of completions without a reward. Episodes that failed do not count: nothing scores them."""
    scored = [i for i, row in enumerate(rows) if row.reason is None]

    def share(values: Sequence[float | None]) -> float:
        return sum(values[i] is None for i in scored) / max(1, len(scored))

    return {
        "reward_none_fraction": share([row.reward for row in rows]),
        "rewards_none_fraction": {name: share(column) for name, column in columns.items()},
    }


def _staleness(rows: Sequence[TrajectorySample]) -> dict[str, int]:
    tokens: Counter[int] = Counter()
    for row in rows:
        tokens.update(row.staleness)
    return {str(age): tokens[age] for age in sorted(tokens)}


def _of_episodes(rows: Sequence[TrajectorySample]) -> dict[str, Any]:
    return {
        "turns_mean": mean(row.turns for row in rows),
        "tool_calls": sum(row.tool_calls for row in rows),
        "tool_errors": sum(row.tool_errors for row in rows),
        "environment_s_mean": mean(row.environment_s for row in rows),
        "episodes_failed": sum(row.reason is not None for row in rows),
    }


def load_fields(loads: Iterable[Loads]) -> dict[str, dict[str, int]]:
    """Add up the loads of the generators that all ranks know. Returns nothing if there are none."""
    sampled, outstanding = Counter[str](), Counter[str]()
    for load in loads:
        sampled.update(load.sampled)
        outstanding.update(load.outstanding)
    return {"replica_tokens": dict(sampled), "replica_outstanding": dict(outstanding)} if sampled else {}


def failures(rows: Sequence[TrajectorySample]) -> str | None:
    """Say how many episodes failed and why, the most frequent reasons first. None if none failed."""
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    if not reasons:
        return None
    shown = [f"{reason} ({count}×)" for reason, count in reasons.most_common(_SHOWN_REASONS)]
    more = f"; and {len(reasons) - len(shown)} other reasons" if len(reasons) > len(shown) else ""
    return f"{reasons.total()} of {len(rows)} episodes failed: {'; '.join(shown)}{more}"


def trajectory_records(
    version: Version, groups: Sequence[Group], count: int, *, skipped: bool = False, tokens: TokenLog = NO_TOKENS
) -> list[dict[str, Any]]:
    """Make lines of `rollouts.jsonl` for `count` trajectories: first one of each group, then a second of each.

    As many that failed are added, with their reasons.

    Args:
        version: the version that was trained on them, or would have been if they had not been skipped.
        skipped: the complete batch was skipped. In other batches, only groups with equal rewards are skipped.
        tokens: makes the fields about advantage and tokens.
    """
    pairs = [(group, i) for i in range(len(groups[0].trajectories)) for group in groups]
    failed = [(group, i) for group, i in pairs[count:] if group.trajectories[i].status == "failed"]
    chosen = [*pairs[:count], *failed[:count]]
    return [_record(version, group, i, tokens, skipped=skipped or not group.has_signal) for group, i in chosen]


def _record(version: Version, group: Group, index: int, tokens: TokenLog, *, skipped: bool) -> dict[str, Any]:
    trajectory = group.trajectories[index]
    spans = [span for sequence in trajectory.sequences for span in sequence.versions]
    return {
        "step": version.step,
        "skipped": skipped,
        "row": group.row,
        "prompt": as_text(trajectory.prompt),
        "completion": as_text(trajectory.completion),
        "reward": trajectory.reward,
        "rewards": trajectory.rewards,
        "status": trajectory.status,
        "reason": trajectory.reason,
        "turns": trajectory.turns,
        "tool_calls": trajectory.tool_calls,
        "tool_errors": trajectory.tool_errors,
        "tokens": trajectory.num_sampled,
        "versions": [str(span.version) for span in spans],
        "messages": trajectory.messages,
        **tokens.fields(trajectory),
    }


def as_text(messages: Sequence[ChatMessage]) -> str:
    """Return the text of a single message, or a transcript of several."""
    if len(messages) == 1 and not messages[0].get("tool_calls"):
        return str(messages[0]["content"])
    return "\n".join(_line(message) for message in messages)


def _line(message: ChatMessage) -> str:
    calls = message.get("tool_calls")
    parts = [str(message.get("content") or ""), json.dumps(calls, ensure_ascii=False) if calls else ""]
    return f"{message['role']}: {' '.join(filter(None, parts))}"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None. Returns None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def std(values: Iterable[float | None]) -> float | None:
    """Population standard deviation of the values that are not None. Returns None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.pstdev(known) if known else None


class JsonLinesWriter:
    """A file with one JSON object per line. Each object has a `step`; steps never decrease."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.kept: list[Mapping[str, Any]] = []
        """Records that could not be written because the disk was full. The next `append` writes them first."""

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per record. If an error occurs, no line is added, and all records are kept in memory.

        A last line that a killed process has left incomplete is removed. Otherwise the first record would continue it.
        NaN and infinity become null, because JSON cannot express them.

        Raises:
            OSError: such as ENOSPC when the disk is full.
        """
        self.kept += records
        if not self.kept:
            return
        self._write("".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in self.kept).encode())
        self.kept.clear()

    def _write(self, data: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            self._remove_incomplete_line(file)
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):  # the disk became full in between
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            except OSError:
                file.truncate(end)
                raise

    def _remove_incomplete_line(self, file: FileIO) -> None:
        """Cut off what follows the last newline, or end it with one if it is complete."""
        with self._path.open("rb") as written:
            size = written.seek(0, os.SEEK_END)
            written.seek(max(0, size - 1))
            if written.read() in (b"", b"\n"):
                return
            written.seek(0)
            *_, last = written.read().split(b"\n")
        if _step(last) < math.inf:
            file.write(b"\n")
        else:
            file.truncate(size - len(last))

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines. The file is replaced atomically.

        Raises:
            OSError: the disk is full, for example. The file is as before.
        """
        temporary = self._path.with_name(f".{self._path.name}")
        temporary.write_text("".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records))
        temporary.replace(self._path)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the record of every complete line."""
        if self._path.exists():
            with self._path.open(errors="replace") as file:
                for line in file:
                    with suppress(json.JSONDecodeError):  # a crash has truncated the line
                        yield json.loads(line)

    def last_step(self) -> int:
        """The step of the last record; -1 if there is none."""
        if self.kept:
            return int(self.kept[-1]["step"])
        last = deque(self.read(), maxlen=1)
        return int(last[0]["step"]) if last else -1

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run computes again, and a truncated last line.

        They are at the end. The file is cut in place, which works on a full disk too.
        """
        self.kept = [record for record in self.kept if record["step"] <= step]
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            position = end = 0
            for line in file:
                position += len(line)
                if _step(line) <= step:
                    end = position
            file.truncate(end)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot express (NaN, infinity) by None."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: bytes) -> float:
    """The step of a line; infinite if it is damaged. A complete line may be long, so only its beginning is read."""
    if line.endswith(b"}\n") and (found := _STEP.match(line)):
        return int(found[1])
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
