"""What `accelerate launch` or its configuration file may not decide, because the trainer's configuration does.

Accelerate reads its settings from variables. `ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4`, for example, would divide
every gradient without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

from .config import TrainerConfig
from .errors import UserError

_PLAIN = (
    "Start plain processes: `accelerate launch --multi_gpu --num_processes N`, or TANDEM_TRAINER_PROCESSES=N with "
    "`python -m tandem_trainer.launch`"
)
_SHARDING = f"set trainer.learner.parallelism: fsdp2 to spread parameters over processes. {_PLAIN}"
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
"""Variable → the values that change nothing, and what to do in place of another."""


def check_environment(env: Mapping[str, str], config: TrainerConfig, *, has_accelerator: bool) -> None:
    """Refuse variables by which accelerate would change the arithmetic or the devices.

    Raises:
        UserError: names the variable, its value and the key of our configuration.
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
                f"got {name}={value} in the environment, from you, `accelerate launch` or the file that `accelerate "
                f"config` wrote; expected {' or '.join(filter(None, neutral)) or 'no value'}. Fix: {fix}."
            )
