"""Two ranks fail together where one of them cannot go on alone, and write the checkpoint of the last complete step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.ranks import run_ranks
from support.run_folders import GROUPS, Saved, make_run
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import StoreError
from tandem_protocol.version import Version
from tandem_trainer import loop, publication
from tandem_trainer import publish as publishing
from tandem_trainer.publish import Publisher
from tandem_trainer.ranks import FailedTogether, own_errors, together

FAILS_IN_STEP = 2
PLACES = ("rollouts", "publish", "evaluate")


class Learner(Saved):
    model = None
    completed_updates: int | None = 0

    def update(self, *_: object) -> dict[str, float]:
        assert self.completed_updates is not None, "set at the start"
        self.completed_updates += 1
        return {"loss": 0.25}


def _fail_in(place: str, folder: Path) -> None:
    """Train with both ranks. Rank 0 fails at `place` in step 2."""
    learner: Any = Learner()
    run = make_run(folder, checkpoint={"every_steps": 100})
    rank = Accelerator(cpu=True).process_index

    def part(name: str, result: Any) -> Callable[..., Any]:
        def call(*_: object) -> Any:
            if (name, rank, learner.completed_updates) == (place, 0, FAILS_IN_STEP):
                raise TimeoutError("the generator is gone")
            return result

        return call

    def phase(name: str, result: Any) -> Callable[..., Any]:
        return lambda *_: together(run._accelerator, part(name, result))

    rollouts: Any = Saved()
    algorithm: Any = SimpleNamespace(make_batch=lambda *_: SimpleNamespace(has_signal=True))
    with pytest.raises(TimeoutError if rank == 0 else FailedTogether), own_errors():
        loop.train(
            run._config,
            run,
            rollouts,
            learner,
            algorithm,
            sample=phase("rollouts", GROUPS),
            update=learner.update,
            publish=phase("publish", Version(1, 1)),
            published=lambda: None,
            evaluate=phase("evaluate", None),
        )


def _publish(folder: Path) -> None:
    """Rank 0 talks to the generators. Both ranks know if they do not serve the version."""
    accelerator = Accelerator(cpu=True)

    fault = SimpleNamespace(place="")

    def fail() -> None:
        raise TimeoutError("not served")

    def wait(_: object) -> None:  # as `Run.wait` does
        together(accelerator, fail if accelerator.is_main_process else lambda: None)

    @contextmanager
    def staging(*_: object, owner: bool = True, **__: object) -> Iterator[Path]:
        if owner:
            assert accelerator.is_main_process, "the other rank waits"
            if fault.place == "stage":
                raise StoreError("the volume is full")
        yield folder

    def write(*_: object) -> dict[str, str]:
        if fault.place == "write" and not accelerator.is_main_process:
            raise OSError("the disk is broken")
        return {}

    vars(publishing).update(model_table=lambda *_: {}, model_tensors=lambda *_: iter(()))  # in this process only
    vars(publication).update(write_files=write)
    stand_ins: dict[str, Any] = {
        "store": SimpleNamespace(retain=lambda _: None, staging=staging),
        "client": SimpleNamespace(set_weights=None),
        "portal": SimpleNamespace(start_task_soon=lambda *_: "a task", call=lambda *_: None),
        "model_fingerprint": None,
    }
    publish = Publisher(
        wait=wait, config=PublishConfig(timeout_s=1), run_name="r", attempt=1,
        dtype=torch.float32, accelerator=accelerator, **stand_ins,
    )  # fmt: skip
    for place, error, main_fails in (
        ("stage", StoreError, True), ("write", OSError, False), ("switch", TimeoutError, True),
    ):  # fmt: skip
        fault.place = place
        with pytest.raises(FailedTogether) as failed:
            publish(torch.nn.Linear(1, 1), 1)
        assert isinstance(failed.value.__cause__, error) == (accelerator.is_main_process == main_fails)


def _fail_everywhere(folder: Path) -> None:
    for place in PLACES:
        _fail_in(place, folder / place)
    _publish(folder)


def test_two_ranks_write_a_checkpoint_if_one_fails(tmp_path: Path) -> None:
    run_ranks(2, _fail_everywhere, tmp_path)
    for place in PLACES:
        (checkpoint,) = (tmp_path / place / "default" / "checkpoints").iterdir()
        assert checkpoint.name == f"{FAILS_IN_STEP:06d}"
        assert sorted(path.name for path in checkpoint.glob("rollouts-*")) == ["rollouts-0.json", "rollouts-1.json"]


def test_a_single_rank_raises_its_own_error() -> None:
    with pytest.raises(KeyError):
        together(Accelerator(cpu=True), {}.__getitem__, "absent")
