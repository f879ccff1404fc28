"""A normal run prints no warnings, so that a real warning is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.json_logs import records
from support.projects import Project


@pytest.mark.parametrize(
    ("ranks", "runs", "trainer"),
    [
        (1, [2], {"learner": {"gradient_checkpointing": True, "dtype": "bfloat16"}, "lora": {"r": 2}}),
        (2, [1, 2], {"learner": {"parallelism": "fsdp2"}}),
    ],
    ids=["one process", "sharded and resumed"],
)
def test_a_successful_run_writes_nothing_to_stderr(
    make_project: Callable[..., Project], ranks: int, runs: list[int], trainer: dict[str, Any]
) -> None:
    project = make_project(**trainer)
    project.forks = False
    for steps, form in zip(runs, ("text", "json"), strict=False):
        done = project.train(f"--trainer.max_steps={steps}", ranks=ranks, TANDEM_LOG=form)
        assert (done.returncode, done.stderr) == (0, "")
    if form == "json":
        assert {record["logger"].partition(".")[0] for record in records(done.stdout)} == {"tandem_trainer"}
    assert project.steps == [1, 2]
