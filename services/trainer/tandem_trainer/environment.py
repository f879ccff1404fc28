"""Refuse settings of `accelerate` that contradict the trainer's configuration.

Accelerate reads its settings from environment variables, which `accelerate launch` sets from its options and its
configuration file. For example, `ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4` would silently divide every gradient by 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.errors import UserError

_PLAIN = (
    "Start plain processes: `accelerate launch --multi_gpu --num_processes N`, or TANDEM_TRAINER_PROCESSES=N with "
    "`python -m tandem_trainer.launch`"
)
_SHARDING = f"set trainer.learner.parallelism: fsdp2 to shard parameters over processes. {_PLAIN}"
_OFF = ("", "0", "false", "no", "off", "n", "f")
_NEUTRAL: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_USE_FSDP": (_OFF, _SHARDING),
    "ACCELERATE_USE_DEEPSPEED": (_OFF, _SHARDING),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, _SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, _SHARDING),
    "ACCELERATE_USE_SAGEMAKER": (_OFF, _PLAIN),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "leave it out: trainer.rollout.num_prompts is the batch of a step, and "
        "trainer.learner.max_tokens_per_micro_batch cuts it to fit the memory",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (("", "no"), "set trainer.learner.compile: true to compile the model"),
    "ACCELERATE_TORCH_DEVICE": (("",), "choose devices with CUDA_VISIBLE_DEVICES"),
}
"""Variable → the values that have no effect, and the fix for any other value."""


def check_environment(env: Mapping[str, str], config: TrainerConfig, *, has_accelerator: bool) -> None:
    """Check that no variable makes accelerate change the arithmetic or the devices.

    Raises:
        UserError: a variable does; names it, its value, and the configuration key to use instead.
    """
    rules = dict(_NEUTRAL)
    precision = "bf16" if config.learner.dtype == "bfloat16" else "no"
    rules["ACCELERATE_MIXED_PRECISION"] = (
        ("", "no", precision),
        "pass --mixed_precision no, and set trainer.learner.dtype, float32 or bfloat16",
    )
    if has_accelerator:
        rules["ACCELERATE_USE_CPU"] = (_OFF, "set CUDA_VISIBLE_DEVICES= (empty) to train on CPUs")
    for name, (neutral, fix) in rules.items():
        value = env.get(name, "")
        if value.lower() not in neutral:
            raise UserError(
                f"got {name}={value} in the environment, expected {' or '.join(filter(None, neutral)) or 'no value'}. "
                "It comes from your shell, `accelerate launch`, or the file that `accelerate config` wrote. Fix: "
                f"{fix}."
            )
