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
        (("PROJECT=/srv/My Project (2)",), {}, "tandem-my-project--2-"),
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


def test_the_path_of_the_project_may_have_spaces(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/say_build").write_text("#!/bin/sh\n")
    (tmp_path / "scripts/up").write_text('#!/bin/sh\necho "got $TANDEM_PROJECT as $COMPOSE_PROJECT_NAME"\n')
    for script in (tmp_path / "scripts").iterdir():
        script.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("NAME", "PROJECT", "COMPOSE_PROJECT_NAME")}
    command = ["make", "--file", str(ROOT / "Makefile"), "up", "PROJECT=my project"]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert f"got {tmp_path}/my project as tandem-my-project\n" in shown
