"""A warning in every run hides the one that matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.projects import Project


@pytest.mark.parametrize(
    ("ranks", "runs", "trainer"),
    [
        (1, [2], {"learner": {"gradient_checkpointing": True, "dtype": "bfloat16"}, "lora": {"r": 2}}),
        (2, [1, 2], {"learner": {"parallelism": "fsdp2"}}),
    ],
    ids=["one process", "sharded and resumed"],
)
def test_a_run_that_goes_well_warns_of_nothing(
    make_project: Callable[..., Project], ranks: int, runs: list[int], trainer: dict[str, Any]
) -> None:
    project = make_project(**trainer)
    for steps in runs:
        done = project.train(f"--trainer.max_steps={steps}", ranks=ranks)
        assert (done.returncode, done.stderr) == (0, "")
    assert project.steps == [1, 2]
