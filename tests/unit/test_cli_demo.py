"""`tandem demo`: errors that keep it from starting, and the commands of its services."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.demo import fake_project
from tandem_cli.__main__ import main
from tandem_cli.project import Project
from tandem_cli.service_commands import _generator_command


def runs_is_a_file(folder: Path) -> None:
    (folder / "runs").write_text("")


def logs_is_a_file(folder: Path) -> None:
    (folder / "runs" / "default").mkdir(parents=True)
    (folder / "runs" / "default" / "logs").write_text("")


@pytest.mark.parametrize(
    ("arguments", "before", "message"),
    [
        ((), runs_is_a_file, "trainer.output_dir: {}/runs cannot be written to: File exists"),
        (("--resume",), logs_is_a_file, "trainer.output_dir: {}/runs/default/logs cannot be written to: File exists"),
        (("--trainer.output_dir=/proc/x",), None, "trainer.output_dir: /proc/x cannot be written to"),
        (("--trainer.run_name=a/b",), None, "trainer.run_name: got 'a/b'"),
        (("--trainer.max_steps", "true"), None, "trainer.max_steps: got 'true'"),
        (("word",), None, "got the argument 'word'"),
    ],
)
def test_a_demo_that_cannot_start_prints_a_one_line_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    before: Callable[[Path], None] | None,
    message: str,
) -> None:
    fake_project(tmp_path)
    if before:
        before(tmp_path)
    assert main(["demo", str(tmp_path), "--plain", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " + message.format(tmp_path))


def test_the_demos_engine_overrides_the_projects_engine(tmp_path: Path) -> None:
    project = Project.read(fake_project(tmp_path), {"generator.engine": "vllm", "generator.port": "1"})
    assert _generator_command(project, "mock")[-3:] == ["--engine", "mock", "--generator.port=1"]
    assert _generator_command(project, "vllm")[-2:] == ["--generator.engine=vllm", "--generator.port=1"]
    assert project.settings.generator.port == 1
