"""What alerts look at: pure functions over the records of a run's steps.

A measure gets the newest records, oldest first, and what does not change during a run. It returns one figure, which is
compared with the limit of the same name in `trainer.alerts`. None: this step says nothing about it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tandem_protocol.config.alerts import MAX_IN_A_ROW

Record = Mapping[str, Any]
Records = Sequence[Record]

WINDOW = MAX_IN_A_ROW
"""Number of records that the measures get."""
STEPS = 5
"""A figure of a single step has to be beyond its limit this often in a row."""
SHORT_TOKENS = 64
"""Completions that are shorter than this on average are not too long."""
NOISE = 1.0
"""An evaluation of n prompts with rewards from 0 to 1 varies by less than NOISE / sqrt(n): two standard errors."""


class Facts(NamedTuple):
    """What the measures know besides the records."""

    num_prompts: int | None = None
    """Groups that a step learns from. None: not known."""
    max_grad_norm: float = 1.0
    compares: bool = False
    """Whether trainer and generators compute the same probabilities. False for the mock."""
    mismatch: float | None = None
    """Moving average of the mismatch, as a multiple of what rounding explains. None: not known."""
    mismatch_text: str = ""
    """What that average is, and its likely causes."""


def newest(*names: str) -> Callable[[Records, Facts], float | None]:
    """The newest value of the first of these fields that the record has."""

    def measure(records: Records, _: Facts) -> float | None:
        values = [records[-1][name] for name in names if name in records[-1]]
        return values[0] if values and is_number(values[0]) else None

    return measure


def share(*names: str) -> Callable[[Records, Facts], float | None]:
    """Mean of the first of these fields over 10 steps, at least STEPS, because a batch may be small."""

    def measure(records: Records, _: Facts) -> float | None:
        name = next((name for name in names if name in records[-1]), "")
        values = numbers(records[-10:], name)
        return statistics.fmean(values) if len(values) >= STEPS else None

    return measure


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def numbers(records: Records, name: str) -> list[float]:
    """The finite values of a field."""
    return [record[name] for record in records if is_number(record.get(name))]


def run_length(records: Records, is_so: Callable[[Record], bool]) -> float:
    """How many of the newest records in a row are so."""
    length = 0
    for record in reversed(records):
        if not is_so(record):
            break
        length += 1
    return float(length)


def mismatch(records: Records, facts: Facts) -> float | None:
    return facts.mismatch if facts.compares and is_number(records[-1].get("mismatch")) else None


def kl_sampler(records: Records, facts: Facts) -> float | None:
    return newest("kl_sampler")(records, facts) if facts.compares else None


def entropy(records: Records, _: Facts) -> float | None:
    """Mean over 10 steps. Infinite if rewards hardly differ: a policy that has solved its task may be sure.

    Batches that were skipped have no entropy. They are frequent when a policy collapses.
    """
    recent = [record for record in records if is_number(record.get("entropy"))][-10:]
    values, means, stds = (numbers(recent, name) for name in ("entropy", "reward_mean", "reward_std"))
    if not is_number(records[-1].get("entropy")) or len(values) < 10:
        return None
    if means and stds and statistics.fmean(stds) < 0.1 * abs(statistics.fmean(means)):
        return math.inf
    return statistics.fmean(values)


def batches_without_signal(records: Records, _: Facts) -> float:
    """Batches without any reward do not count: that is another alert."""

    def is_equal(one: Record) -> bool:
        is_skipped = one.get("skipped") or one.get("frac_reward_zero_std") == 1
        return bool(is_skipped) and is_number(one.get("reward_mean"))

    return run_length(records, is_equal)


def function_missing(records: Records, _: Facts) -> float | None:
    """The largest share of a function, over 10 steps. None with a single function: see `reward_missing`."""
    shares = shares_by_function(records)
    return max(shares.values(), default=None) if len(shares) > 1 else None


def shares_by_function(records: Records) -> dict[str, float]:
    recent = [record.get("rewards_none_fraction") or {} for record in records[-10:]]
    if len(recent) < STEPS:
        return {}
    return {name: statistics.fmean(numbers(recent, name)) for name in recent[-1]}


def most_silent(records: Records, _: Facts) -> str:
    shares = shares_by_function(records)
    return max(shares, key=shares.__getitem__, default="")


def length_growth(records: Records, _: Facts) -> float | None:
    """Mean of the newest 5 steps ÷ median of those at least 10 steps before."""
    name = "completion_tokens_mean"
    now, before = numbers(records[-5:], name), numbers(records[:-10], name)
    if len(now) < 5 or len(before) < 5:
        return None
    length = statistics.fmean(now)
    return length / max(statistics.median(before), 1.0) if length >= SHORT_TOKENS else 0.0


def grad_norm_growth(records: Records, facts: Facts) -> float | None:
    """The newest norm ÷ median of the 20 steps before. 0 if it is not clipped, or one of those was similar."""
    norm, before = numbers(records[-1:], "grad_norm"), numbers(records[-21:-1], "grad_norm")
    if not norm or len(before) < 10:
        return None
    is_spike = norm[0] > max(facts.max_grad_norm, 2 * max(before))
    return norm[0] / max(statistics.median(before), 1e-9) if is_spike else 0.0


def not_finite(records: Records, _: Facts) -> float:
    names = ("loss", "grad_norm")
    return run_length(records, lambda one: any(name in one and not is_number(one[name]) for name in names))


def zero_learning_rate(records: Records, _: Facts) -> float:
    return run_length(records, lambda one: one.get("learning_rate") == 0)


def reasked(records: Records, facts: Facts) -> float | None:
    """Over 10 steps."""
    values = numbers(records[-10:], "reasked")
    if len(values) < STEPS or not facts.num_prompts:
        return None
    return sum(values) / (len(values) * facts.num_prompts)


def tool_errors(records: Records, _: Facts) -> float | None:
    """Over 10 steps, if there were 20 calls."""
    calls, errors = (sum(numbers(records[-10:], name)) for name in ("tool_calls", "tool_errors"))
    return errors / calls if calls >= 20 else None


def evaluation_fall(records: Records, _: Facts) -> float | None:
    """How much the mean of the last two evaluations is below the best before. 0 if the training reward does not rise.

    The records are those that have an evaluation, each with `train_reward`: the training reward at that time.
    """
    known = [one for one in records if is_number(one["eval"].get("reward_mean")) and is_number(one["train_reward"])]
    if len(known) < 3 or known[-1] is not records[-1]:
        return None
    best = max(known[:-2], key=lambda one: one["eval"]["reward_mean"])
    top = best["eval"]["reward_mean"]
    last = [one["eval"]["reward_mean"] for one in known[-2:]]
    fall = top - statistics.fmean(last)
    rise = min(one["train_reward"] for one in known[-2:]) - best["train_reward"]
    is_noise = max(last) >= top or fall < NOISE / math.sqrt(max(1, known[-1]["eval"].get("n", 1)))
    return 0.0 if is_noise or rise <= 0.1 * abs(best["train_reward"]) else fall / max(abs(top), 1e-9)


def train_reward(records: Iterable[Record]) -> float | None:
    """Mean training reward of these records."""
    known = numbers(list(records), "reward_mean")
    return statistics.fmean(known) if known else None
