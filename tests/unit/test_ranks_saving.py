"""If one rank cannot write its part of a checkpoint, all ranks report it, none hangs, and a later attempt succeeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer.learner.learner import Learner
from tandem_trainer.ranks import PartFailed

CASES = {
    "ddp": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "fsdp2": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "fsdp2-lora": ["adapter_model.safetensors"],
}
"""The files that ranks write. For each in turn, a folder with its name makes writing fail."""


def save(model: Path, out: Path) -> None:
    """Run on each rank."""
    accelerator = Accelerator(cpu=True)
    seen = []
    for case, files in CASES.items():
        parallelism, _, lora = case.partition("-")
        trainer = {"max_steps": 1, "output_dir": out, "rewards": [{"function": "rewards:r"}],
                   "learner": {"parallelism": parallelism}, "lora": {"r": 4} if lora else None}  # fmt: skip
        torch.manual_seed(0)
        config = TrainerConfig.model_validate(trainer)
        learner = Learner(SharedConfig(model=str(model)), config, make_tokenizer(), accelerator, needs_reference=False)
        for number, file in enumerate(files):
            directory = out / f"{case}-{number}"
            obstacle = directory / "model" / file
            obstacle.mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            try:
                learner.save(directory)
            except PartFailed as error:
                seen.append([case, file, str(error)])
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                obstacle.rmdir()
            accelerator.wait_for_everyone()
            learner.save(directory)
            learner.load(directory)
    (out / f"seen-{accelerator.process_index}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For each rank, the message of each failure."""
    out = tmp_path_factory.mktemp("out")
    run_ranks(2, save, make_tiny_model(out / "model"), out)
    lists = [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(2)]
    return [{f"{case} {file}": error for case, file, error in one} for one in lists]


def test_every_failure_is_reported_on_every_rank(seen: list[dict[str, str]]):
    expected = [f"{case} {file}" for case, files in CASES.items() for file in files]
    assert [list(one) for one in seen] == [expected, expected]


def test_failing_rank_reports_the_cause(seen: list[dict[str, str]]):
    for failures in zip(*(one.values() for one in seen), strict=True):
        assert sorted("IsADirectoryError" in failure for failure in failures) == [False, True]
        assert "it failed on another rank" in failures
