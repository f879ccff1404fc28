"""Variables that make accelerate change the arithmetic or the devices are refused."""

from __future__ import annotations

import pytest

from tandem_protocol.config.learning import LearnerConfig
from tandem_protocol.config.rollout import RewardConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError
from tandem_trainer.environment import check_environment


def config(dtype: str = "float32") -> TrainerConfig:
    return TrainerConfig(
        max_steps=1, rewards=(RewardConfig(function="r:r"),), learner=LearnerConfig.model_validate({"dtype": dtype})
    )


@pytest.mark.parametrize(
    ("variable", "fix"),
    [
        ("ACCELERATE_USE_FSDP=true", "trainer.learner.parallelism: fsdp2"),
        ("ACCELERATE_USE_FSDP=1", "trainer.learner.parallelism: fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED=True", "trainer.learner.parallelism: fsdp2"),
        ("ACCELERATE_USE_MEGATRON_LM=true", "trainer.learner.parallelism: fsdp2"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "trainer.learner.parallelism: fsdp2"),
        ("ACCELERATE_USE_SAGEMAKER=true", "TANDEM_TRAINER_PROCESSES"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "max_tokens_per_micro_batch"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=auto", "max_tokens_per_micro_batch"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "trainer.learner.compile: true"),
        ("ACCELERATE_MIXED_PRECISION=fp16", "trainer.learner.dtype"),
        ("ACCELERATE_MIXED_PRECISION=fp8", "trainer.learner.dtype"),
        ("ACCELERATE_MIXED_PRECISION=bf16", "trainer.learner.dtype"),
        ("ACCELERATE_TORCH_DEVICE=cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("ACCELERATE_USE_CPU=true", "CUDA_VISIBLE_DEVICES= "),
    ],
)
def test_a_variable_that_would_change_training_is_refused_with_the_key_to_use(variable: str, fix: str) -> None:
    name, _, value = variable.partition("=")
    with pytest.raises(UserError, match=f"got {variable} .*Fix: .*{fix}"):
        check_environment({name: value}, config(), has_accelerator=True)


def test_the_defaults_of_accelerate_launch_are_accepted() -> None:
    env = {
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_LOG_LEVEL": "INFO",
    }
    check_environment(env, config(), has_accelerator=True)
    check_environment(env, config("bfloat16"), has_accelerator=True)


def test_variables_that_agree_with_the_configuration_are_accepted() -> None:
    check_environment({"ACCELERATE_MIXED_PRECISION": "bf16"}, config("bfloat16"), has_accelerator=True)
    check_environment({"ACCELERATE_USE_CPU": "true"}, config(), has_accelerator=False)
