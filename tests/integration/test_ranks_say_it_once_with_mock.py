"""The log of two trainer processes has each line once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support.projects import Project


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--trainer.rewards", "[{function: absent:reward}]"], [" ERROR    "]),
        (["--shared.generators", "['http://127.0.0.1:1']"], ["waiting for generator", " ERROR    waited 1 s"]),
    ],
    ids=["a mistake", "a lost generator"],
)
def test_two_processes_say_once_what_both_find_out(
    make_project: Callable[..., Project], words: list[str], lines: list[str]
):
    ended = make_project(start_timeout_s=1).train(*words, ranks=2)
    assert ended.returncode > 0
    assert [ended.stderr.count(line) for line in lines] == [1] * len(lines), ended.stderr
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in ended.stderr.splitlines()), ended.stderr
