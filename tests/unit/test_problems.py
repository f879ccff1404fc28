"""What libraries say in many lines is told in one."""

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


def test_the_first_problem_is_told_with_its_value_and_the_number_of_the_others() -> None:
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
def test_a_problem_says_what_was_expected(values: dict[str, object], summary: str) -> None:
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
def test_an_error_is_one_short_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_a_long_value_is_cut_in_the_middle() -> None:
    text = shorten(list(range(1000)))
    assert text.startswith("[0, 1, 2")
    assert text.endswith("998, 999]")
    assert len(text) == 81
    assert shorten("short") == "'short'"
