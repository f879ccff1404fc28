"""The memory that `tandem doctor` expects of the trainer is what an update needs on the GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import gpu
from support.facts import on_gpus, settings
from support.gpu_updates import config_of, learner_of, random_groups
from support.shapes import write_model
from tandem_cli.doctor.checks import memory
from tandem_cli.doctor.model import read_model
from tandem_trainer.algorithms.grpo import Grpo

pytestmark = pytest.mark.gpu

TOO_LOW, TOO_HIGH = 1.05, 0.75
"""Bounds of measured ÷ estimated. The doctor warns of an estimate above 0.9 of the memory."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("0.5B", tmp_path_factory.mktemp("half_billion"), gpu.device())


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="measures the memory of a GPU")
@pytest.mark.parametrize(
    ("learner", "others"),
    [
        ({}, {}),
        ({"shared_prompts": "never"}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"max_tokens_per_micro_batch": 2048}, {}),
        ({}, {"lora": {"r": 16}}),
        ({"gradient_checkpointing": True}, {"lora": {"r": 16}}),
        ({"dtype": "float32", "max_tokens_per_micro_batch": 4096}, {}),
    ],
    ids=str,
)
def test_an_update_needs_what_the_doctor_expects(model_dir: Path, learner: dict[str, Any], others: dict[str, Any]):
    options = {"learner": {"dtype": "bfloat16"} | learner, **others}
    facts = replace(on_gpus(), model=read_model(model_dir), settings=settings(trainer=options))
    estimated = memory.trainer_need(facts).size_bytes
    config = config_of(**options)
    gpu.reset_peak()
    with gpu.accelerator(config) as accelerator:
        policy, algorithm = learner_of(model_dir, config, accelerator), Grpo(config)
        groups = random_groups(prompts=4, completions=8, prompt_tokens=128, completion_tokens=256, vocab=10_000)
        for _ in range(2):  # AdamW makes its moments in the first
            policy.update(algorithm.make_batch(groups), algorithm)
    ratio = gpu.peak_bytes() / estimated
    print(f"{learner}, {others}: measured {gpu.peak_bytes() / 2**30:.2f} GiB, {ratio:.2f} of the estimate")
    assert TOO_HIGH < ratio < TOO_LOW
