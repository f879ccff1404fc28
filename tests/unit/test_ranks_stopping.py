"""If one rank gives up a step on a stop request, all ranks do, and write the checkpoint together."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.ranks import run_ranks
from support.run_folders import GROUPS, Saved, make_run
from tandem_trainer.run import stopping

HAS_TASK = {"rollouts": (True, True), "publish": (True, False)}
"""Which of the two ranks wait for a task of their own."""


def stop(out: Path) -> None:
    """Run on each rank. Rank 0 waits for generators that do not answer, and was asked to stop."""
    stopping.STOP_GRACE_S = 0.0
    rank = int(os.environ["RANK"])
    seen = {}
    for case, has_task in HAS_TASK.items():
        run, saved = make_run(out / case), Saved()
        run.stop_on_signals()
        with run.checkpoint_on_failure(saved, saved):  # type: ignore[arg-type]
            run.make_record(2, GROUPS, {"loss": 0.25})
            task: Any = Future[int]()
            if rank == 1:
                task.set_result(1)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
            run.wait(task if has_task[rank] else None)
            run.make_record(3, GROUPS, {"loss": 0.25})
        run.last_checkpoint(2, saved, saved)  # type: ignore[arg-type]
        seen[case] = [run.is_done, run.should_stop(), run.exit_status]
    (out / f"seen-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_ranks(2, stop, folder)
    return folder


@pytest.mark.parametrize("case", HAS_TASK)
def test_all_ranks_give_up_the_step_and_write_its_predecessors_checkpoint(out: Path, case: str):
    for rank in range(2):
        assert json.loads((out / f"seen-{rank}.json").read_text())[case] == [False, True, 143]
    (checkpoint,) = (out / case / "default" / "checkpoints").iterdir()
    assert checkpoint.name == "000002"
    assert {path.name for path in checkpoint.glob("rollouts-*")} == {"rollouts-0.json", "rollouts-1.json"}
