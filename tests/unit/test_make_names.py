"""`make up` gives each project a compose project of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "environment", "name"),
    [
        ((), {}, "tandem-digits"),
        (("PROJECT=examples/judge/",), {}, "tandem-judge"),
        (("PROJECT=/srv/My.Project_2",), {}, "tandem-my-project_2"),
        (("PROJECT=/srv/My.Project_2", "NAME=second"), {}, "second"),
        ((), {"COMPOSE_PROJECT_NAME": "mine"}, "mine"),
        (("NAME=second",), {"COMPOSE_PROJECT_NAME": "mine"}, "second"),
    ],
)
def test_the_name_follows_from_the_folder(arguments: tuple[str, ...], environment: dict[str, str], name: str) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("NAME", "PROJECT", "COMPOSE_PROJECT_NAME")}
    for target in ("up", "down"):
        shown = subprocess.run(
            ["make", "--print-data-base", "--dry-run", target, *arguments],
            cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert f"{target}: COMPOSE_PROJECT_NAME = $(NAME)" in shown
        assert re.search(r"^NAME :?= (.*)$", shown, re.M)[1] == name  # type: ignore[index]
