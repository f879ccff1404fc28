"""Error messages of libraries are shortened to one line."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field, ValidationError

from tandem_protocol.problems import one_line, shorten, summarize


class Inner(BaseModel):
    logprobs: tuple[float, ...]
    name: str = Field("a", pattern="^a+$")


def problems_of(**values: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Inner.model_validate(values)
    return caught.value


def test_a_summary_has_the_first_problem_and_the_number_of_others() -> None:
    error = problems_of(logprobs=["x"] * 170)
    assert summarize(error.errors()) == "logprobs.0: got 'x'; expected a valid number (169 more problems)"
    assert one_line(error) == summarize(error.errors())


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        ({"logprobs": 5}, "logprobs: got 5; expected a valid tuple"),
        ({"logprobs": (), "name": "b"}, "name: got 'b'; expected text that matches ^a+$"),
        ({}, "logprobs: got {}; Field required"),
    ],
)
def test_a_summary_says_what_was_expected(values: dict[str, object], summary: str) -> None:
    assert summarize(problems_of(**values).errors()) == summary


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\n"), "a b"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (RuntimeError(), "RuntimeError:"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (ValueError("x" * 1000), "x" * 250 + "…"),
    ],
)
def test_one_line_shortens_any_exception(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_a_long_value_is_shortened_in_the_middle() -> None:
    text = shorten(list(range(1000)))
    assert text.startswith("[0, 1, 2")
    assert text.endswith("998, 999]")
    assert len(text) == 81
    assert shorten("short") == "'short'"
