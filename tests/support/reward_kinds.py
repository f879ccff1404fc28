"""Reward functions of every kind, in a module that a sandbox can import: callables, side effects and return values."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
from collections.abc import Awaitable, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

Rewards = list[Any]


def spoil(value: Any) -> None:
    """Modify every list and dictionary in `value`, the inner ones first."""
    if isinstance(value, list):
        for item in value:
            spoil(item)
        value.append("spoilt")
    if isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value["spoilt"] = True


def spoiling(seen: list[dict[str, Any]]) -> Callable[..., Rewards]:
    """Return a reward function that records its arguments, modifies the first items, and records the second ones."""

    def reward(**arguments: Any) -> Rewards:
        seen.append({"got": repr(arguments)})
        for value in arguments.values():
            spoil(value[0] if isinstance(value, list) else value)
        seen[-1]["second items"] = repr({name: value[1] for name, value in arguments.items() if name != "options"})
        return [1.0] * len(arguments["completions"])

    return reward


def unspoilt(spoilt: list[str] | None = None, **arguments: Any) -> Rewards:
    """Return rewards of 1 if no argument was modified before, and modify all of them."""
    rewards = [float("spoilt" not in repr((arguments, spoilt)))] * len(arguments["completions"])
    spoil(arguments)
    spoil(spoilt)
    return rewards


async def asynchronous(completions: list[str], **_: Any) -> Rewards:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def synchronous(completions: list[str], **_: Any) -> Rewards:
    return [float(len(text)) for text in completions]


class Asynchronous:
    async def __call__(self, completions: list[str], **_: Any) -> Rewards:
        return await asynchronous(completions)

    async def method(self, completions: list[str], **_: Any) -> Rewards:
        return await asynchronous(completions)


class Synchronous:
    def __call__(self, completions: list[str], **_: Any) -> Rewards:
        return synchronous(completions)


def decorated(function: Callable[..., Awaitable[Rewards]]) -> Callable[..., Awaitable[Rewards]]:
    @functools.wraps(function)
    def call(**arguments: Any) -> Awaitable[Rewards]:
        return function(**arguments)

    return call


class _Awaitable:
    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self._rewards


def awaitable(completions: list[str], **_: Any) -> _Awaitable:
    return _Awaitable(synchronous(completions))


async_object = Asynchronous()
sync_object = Synchronous()
async_method = Asynchronous().method
partial_of_async = functools.partial(asynchronous, unused=1)
partial_of_object = functools.partial(Asynchronous(), unused=1)
decorated_async = decorated(asynchronous)
decorated_object = decorated(Asynchronous())
CALLABLES = [
    "asynchronous",
    "synchronous",
    "async_object",
    "sync_object",
    "async_method",
    "partial_of_async",
    "partial_of_object",
    "decorated_async",
    "decorated_object",
    "awaitable",
    "same_loop",
]

_loops: list[asyncio.AbstractEventLoop] = []


async def same_loop(completions: list[str], **_: Any) -> Rewards:
    """Fail in a second event loop, like a client that is bound to the first one."""
    _loops.append(asyncio.get_running_loop())
    assert _loops[0] is _loops[-1]
    return synchronous(completions)


NUMBERS: dict[str, tuple[Any, list[float | None]]] = {
    "floats": ([0.5, 1.0], [0.5, 1.0]),
    "integers": ([0, 1], [0.0, 1.0]),
    "booleans": ([True, False], [1.0, 0.0]),
    "a tuple with None": ((None, 1), [None, 1.0]),
    "NumPy's floats": ([np.float32(0.5), np.float64(1)], [0.5, 1.0]),
    "NumPy's half and integers": ([np.float16(0.5), np.int8(1)], [0.5, 1.0]),
    "NumPy's booleans": ([np.bool_(True), np.bool_(False)], [1.0, 0.0]),
    "arrays without dimensions": ([np.array(0.5), np.array(1)], [0.5, 1.0]),
    "an array": (np.array([0.5, 1], np.float32), [0.5, 1.0]),
    "a masked array": (np.ma.masked_array([0.5, 1.0], [False, True]), [0.5, None]),  # type: ignore[no-untyped-call]  # numpy has no types
    "decimals and fractions": ([Decimal("0.5"), Fraction(1, 2)], [0.5, 0.5]),
}
NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "NaN": ([0.0, math.nan], "got nan for completion 1"),
    "infinity": ([-math.inf, 0.0], "got -inf for completion 0"),
    "NumPy's NaN": ([0.0, np.float32("nan")], "got nan for completion 1"),
    "a string": ([0.0, "1"], "got '1' for completion 1"),
    "a NumPy string": ([np.str_("1"), 0.0], "got '1' for completion 0"),
    "a complex number": ([1j, 0.0], "got 1j for completion 0"),
    "a list": ([0.0, [1.0]], "got [1.0] for completion 1"),
    "an array with a dimension": ([0.0, np.array([1.0])], "got [1.0] for completion 1"),
    "a column": (np.array([[0.5], [1.0]]), "got [0.5] for completion 0"),
    "a decimal that signals": ([Decimal("sNaN"), 0.0], "got Decimal('sNaN') for completion 0"),
    "an integer beyond all floats": ([0, 10**400], "for completion 1"),
    "too few": ([1.0], "got 1 rewards, expected 2"),
    "a number": (1.0, "got float, expected a list of 2 numbers"),
    "a dictionary": ({0: 1.0, 1: 1.0}, "got dict, expected a list of 2 numbers"),
    "nothing": (None, "got NoneType, expected a list of 2 numbers"),
}


def numbers_of(kind: list[str], **_: Any) -> Any:
    return (NUMBERS.get(kind[0]) or NO_NUMBERS[kind[0]])[0]


def with_alarm(completions: list[str], **_: Any) -> Rewards:
    """Use a signal, as functions with their own time limit do."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(0)
    return [1.0] * len(completions)


def with_math_verify(completions: list[str], **_: Any) -> Rewards:
    """Use math-verify with its default time limits, which use signals."""
    from math_verify import parse

    return [float(bool(parse("$1$"))) for _ in completions]
