"""A rank that waits for generators learns at once that another rank has failed, also if its own task never ends."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import pytest

from support.ranks import run_ranks
from support.run_folders import make_run
from tandem_protocol.errors import WeightsRefused
from tandem_trainer.ranks import FailedTogether, own_errors

SOON_S = 0.5
"""More than the time between two looks at a task."""


class Waits(NamedTuple):
    """What each of the two ranks waits for: `never`, `done`, `soon`, `fails`, or nothing."""

    tasks: tuple[str, str]
    behind: tuple[str, str] = ("", "")
    ends: tuple[str, str] = ("WeightsRefused", "FailedTogether")


CASES = {
    "the version in flight fails on rank 0, without which no rollouts come": Waits(
        ("never", "never"), behind=("fails", "done")
    ),
    "publishing fails on rank 0, and rank 1 waits for it": Waits(("fails", "")),
    "publishing fails on rank 0, and rank 1 still writes its part": Waits(("fails", "never")),
    "rollouts fail on rank 1": Waits(("never", "fails"), ends=("FailedTogether", "WeightsRefused")),
    "rollouts fail on rank 1, and rank 0 has its own": Waits(
        ("done", "fails"), ends=("FailedTogether", "WeightsRefused")
    ),
    "rank 0 is later": Waits(("soon", "done"), ends=("5", "5")),
    "rank 1 has no task": Waits(("soon", ""), ends=("5", "None")),
}


def future(what: str) -> Any:
    if not what:
        return None
    task: Future[int] = Future()
    if what == "done":
        task.set_result(5)
    elif what == "fails":
        Timer(SOON_S, task.set_exception, [WeightsRefused("a file is damaged")]).start()
    elif what == "soon":
        Timer(SOON_S, task.set_result, [5]).start()
    return task


def wait(out: Path) -> None:
    """Run on each rank."""
    rank = int(os.environ["RANK"])
    ends = {}
    for case, waits in CASES.items():
        run = make_run(out / str(list(CASES).index(case)))
        task = future(waits.tasks[rank])
        try:
            with own_errors():
                ends[case] = str(run.wait(task, behind=future(waits.behind[rank])))
        except (WeightsRefused, FailedTogether) as error:
            ends[case] = type(error).__name__
            assert task is None or task.done(), "a task that nobody waits for is cancelled"
    (out / f"{rank}.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_ranks(2, wait, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_their_wait_together(out: Path, case: str) -> None:
    assert tuple(json.loads((out / f"{rank}.json").read_text())[case] for rank in range(2)) == CASES[case].ends
