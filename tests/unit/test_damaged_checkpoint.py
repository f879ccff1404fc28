"""A checkpoint with a damaged or missing file is refused with its path and the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored
from support.run_folders import GROUPS, Saved, make_run
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _learner(model: Path) -> Learner:
    rewards = [{"function": "rewards:r"}]
    config = TrainerConfig.model_validate({"max_steps": 9, "rewards": rewards})
    torch.manual_seed(0)
    return Learner(
        SharedConfig(model=str(model)), config, make_tokenizer(), Accelerator(cpu=True), needs_reference=False
    )


class Queue(Saved):
    """Reads its state, as `Rollouts` does."""

    def load_state_dict(self, state: dict[str, Any], **again: bool) -> None:
        self.state = state["queue"]

    def state_dict(self) -> dict[str, Any]:
        return {"queue": []}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("run")
    learner = _learner(model_dir)
    algorithm = Grpo(TrainerConfig.model_validate({"max_steps": 9, "rewards": [{"function": "rewards:r"}]}))
    group = scored([4, 5], [completion([6, 7]), completion([8, 9])], [1.0, 0.0])
    learner.update(algorithm.make_batch([group]), algorithm)
    run = make_run(folder)
    run.make_record(3, GROUPS, {"loss": 0.25})
    assert run.checkpoint(3, learner, Queue())  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (_cut, "learner.pt"), (_cut, "model/model.safetensors"), (_cut, "rollouts-0.json"), (_cut, "state.json"),
        (_cut, "optimizer/__0_0.distcp"), (_cut, "optimizer/.metadata"),
        (_remove, "learner.pt"), (_remove, "model"), (_remove, "rollouts-0.json"), (_remove, "state.json"),
        (_remove, "optimizer"), (_remove, "optimizer/__0_0.distcp"),
        (lambda path: path.write_text("[]"), "state.json"),
        (lambda path: path.write_text('{"format": 3}'), "state.json"),
        (lambda path: path.write_text("{}"), "rollouts-0.json"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, model_dir: Path, tmp_path: Path, damage: Callable[[Path], Any], file: str
):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    damage(folder / "default" / "checkpoints" / "000003" / file)
    rollouts: Any = Queue()
    with pytest.raises(UserError, match=r"checkpoints/000003 cannot be read: .*delete the checkpoint") as refused:
        make_run(folder).resume(_learner(model_dir), rollouts)
    assert len(str(refused.value)) < 1000


def test_an_intact_checkpoint_is_read(checkpoint: Path, model_dir: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    rollouts: Any = Queue()
    assert make_run(folder).resume(_learner(model_dir), rollouts) == 3
    state = json.loads((folder / "default" / "checkpoints" / "000003" / "state.json").read_text())
    assert state["step"] == 3
