"""Whatever a tool does, the policy gets an answer, and the run goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from tandem_rollout.errors import UserError
from tandem_rollout.tools import Tool, ToolCall, ToolResult, Tools
from tandem_rollout.workers import Workers


def make(function: Callable[..., Any]) -> Tool:
    """A tool without a schema, for functions without a docstring."""
    return Tool(function.__name__, {}, function)


async def ask(function: Callable[..., Any], *, timeout_s: float = 5.0, **arguments: Any) -> ToolResult:
    workers = Workers("test")
    try:
        tools = Tools([make(function)], timeout_s=timeout_s, max_characters=100)
        return await tools.call(ToolCall(function.__name__, arguments), workers)
    finally:
        workers.close()


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


async def add_soon(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    await asyncio.sleep(0)
    return a + b


def error(result: ToolResult) -> str:
    assert result.failed
    return str(json.loads(result.text)["error"])


def test_the_schema_comes_from_types_and_docstring() -> None:
    for function in (add, add_soon):
        schema = Tool.of(function).schema["function"]
        assert schema["description"] == "Add two numbers."
        assert schema["parameters"] == {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first number"},
                "b": {"type": "integer", "description": "the second number"},
            },
            "required": ["a"],
        }


def untyped(a) -> None:
    """Do it.

    Args:
        a: a number
    """


def undocumented(a: int) -> None:
    pass


def undescribed(a: int) -> None:
    """Do it."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (untyped, "tool untyped: .*missing a type hint"),
        (undocumented, "tool undocumented: .*no docstring"),
        (undescribed, "tool undescribed: .*no description for the argument 'a'"),
    ],
)
def test_a_function_without_types_or_descriptions_is_refused_by_name(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tool.of(function)


def test_two_tools_with_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two tools with the name 'add'"):
        Tools([make(add), make(add)], timeout_s=1, max_characters=1)


@pytest.mark.parametrize("function", [add, add_soon])
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ({"a": 1}, "2"),
        ({"a": "7", "b": 2}, "9"),
        ({}, "a: Missing required argument"),
        ({"a": "x"}, "a: expected a valid integer"),
        ({"a": 1, "c": 2}, "c: Unexpected keyword argument"),
        ({"self": 1, "function": 2}, "a: Missing required argument; self: Unexpected"),
    ],
)
async def test_arguments_are_converted_or_refused_with_their_names(
    function: Any, arguments: dict[str, Any], answer: str
) -> None:
    tools = Tools([Tool.of(function)], timeout_s=5, max_characters=1000)
    result = await tools.call(ToolCall(function.__name__, arguments), Workers("test"))
    assert answer in (error(result) if result.failed else result.text)
    assert result.failed == ("expected" in answer or "argument" in answer or "Unexpected" in answer)


async def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    tools = Tools([make(add), make(add_soon)], timeout_s=5, max_characters=1000)
    result = await tools.call(ToolCall("subtract", {}), Workers("test"))
    assert error(result) == "there is no tool 'subtract', only: add, add_soon"


class Unusual:
    """Its type is unknown to pydantic."""


def with_an_unusual_type(what: Unusual) -> str:
    """Do it.

    Args:
        what: something
    """
    return str(what)


async def test_types_that_cannot_be_converted_are_refused_and_not_lost() -> None:
    tools = Tools([Tool.of(with_an_unusual_type)], timeout_s=5, max_characters=1000)
    result = await tools.call(ToolCall("with_an_unusual_type", {"what": 1}), Workers("test"))
    assert "instance of Unusual" in error(result)


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("as it is\n", "as it is\n"),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (3.5, "3.5"),
        (float("nan"), "NaN"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ("Grüße 🙂", "Grüße 🙂"),
        (["Grüße 🙂"], '["Grüße 🙂"]'),
        (b"bytes", "bytes"),
        (bytearray(b"bytes"), "bytes"),
        (Point(1), '{"x":1,"y":null}'),
        ({1: "a", (2,): "b"}, '{"1":"a","2":"b"}'),
        (np.float32(0.5), "0.5"),
        (np.arange(3), "[0,1,2]"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([], "[]"),
        ("lone \ud83d surrogate", "lone \ufffd surrogate"),
        ("pair \ud83d\ude42", "pair 🙂"),
    ],
    ids=repr,
)
async def test_an_answer_is_text_as_it_is_or_json(answer: Any, text: str) -> None:
    result = await ask(lambda: answer)
    assert (result.text, result.failed) == (text, False)
    result.text.encode()


@pytest.mark.parametrize(
    "answer", [object(), CYCLE, itertools.count(), {"a": b"\xff"}, lambda: 1, [10**5000], threading.Lock()]
)
async def test_an_answer_that_is_not_json_is_an_answer_all_the_same(answer: Any) -> None:
    result = await ask(lambda: answer)
    assert result.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"\xff\xfe", "2 bytes that are not text"),
        ([{"type": "image", "image": object()}], "a part of type 'image', expected text"),
    ],
)
async def test_an_answer_that_cannot_be_text_is_an_error_for_the_policy(answer: Any, message: str) -> None:
    assert message in error(await ask(lambda: answer))


async def test_a_long_answer_is_cut_and_says_so() -> None:
    result = await ask(lambda: "x" * 10_000_000)
    assert result.text == "x" * 100 + "… (10000000 characters, of which the first 100 are shown)"
    assert len((await ask(lambda: {"a": "🙂" * 10_000_000})).text) < 200


def raises() -> None:
    raise ValueError("Game over.")


def exits() -> None:
    sys.exit(3)


async def exits_soon() -> None:
    sys.exit(3)


async def cancels_itself() -> None:
    raise asyncio.CancelledError


def stops() -> None:
    next(iter([]))


def raises_unprintable() -> None:
    raise ValueError("\ud83d" + "x" * 10_000_000)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "ValueError: Game over."),
        (exits, "SystemExit: 3"),
        (exits_soon, "SystemExit: 3"),
        (cancels_itself, "cancelled itself"),
        (stops, "StopIteration"),
    ],
)
async def test_a_tool_that_raises_is_an_error_for_the_policy(function: Any, message: str) -> None:
    assert message in error(await ask(function))


async def test_a_tool_that_raises_a_long_message_is_cut() -> None:
    result = await ask(raises_unprintable)
    assert result.failed
    assert len(result.text.encode()) < 1000


async def hangs_soon() -> None:
    await asyncio.sleep(60)


async def hangs_stubbornly() -> None:
    while True:
        try:
            await asyncio.sleep(0.5)
            return
        except asyncio.CancelledError:
            pass


async def test_a_tool_that_hangs_is_left_behind_at_its_deadline() -> None:
    released = threading.Event()

    def hangs() -> None:
        released.wait(30)

    begin = time.monotonic()
    for function in (hangs, hangs_soon, hangs_stubbornly):
        result = await ask(function, timeout_s=0.05)
        assert error(result) == "no answer within 0.05 s"
        assert 0.05 <= result.seconds < 30
    assert time.monotonic() - begin < 30
    released.set()


async def test_a_decorated_coroutine_function_is_awaited() -> None:
    @functools.wraps(add_soon)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return add_soon(*args, **kwargs)

    assert (await ask(decorated, a=1)).text == "2"


class Dice:
    """Its methods are tools."""

    def __init__(self, sides: int) -> None:
        self.sides = sides

    def roll(self, kind: Literal["high", "low"] = "high") -> int:
        """Roll it.

        Args:
            kind: which side
        """
        return self.sides if kind == "high" else 1


async def test_a_method_is_called_on_its_instance() -> None:
    tool = Tool.of(Dice.roll)
    assert "self" not in tool.schema["function"]["parameters"]["properties"]
    for sides in (6, 20):
        tools = Tools([tool.of_instance(Dice(sides))], timeout_s=5, max_characters=100)
        assert (await tools.call(ToolCall("roll", {}), Workers("test"))).text == str(sides)
        assert (await tools.call(ToolCall("roll", {"kind": "low"}), Workers("test"))).text == "1"
        assert "kind: expected 'high' or 'low'" in error(
            await tools.call(ToolCall("roll", {"kind": 3}), Workers("test"))
        )
