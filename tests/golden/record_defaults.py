"""Record `trl-1.16-defaults.json`: every option of TRL's GRPO and Online DPO with its default.

Of the options that TRL inherits from transformers' TrainingArguments, only those that the trainer has too. To run it:

    pip install --no-deps --target DIR trl==1.16.0
    PYTHONPATH=DIR .venv/bin/python tests/golden/record_defaults.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import GRPOConfig
from trl.experimental.online_dpo import OnlineDPOConfig

FILE = Path(__file__).with_name("trl-1.16-defaults.json")
INHERITED = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "gradient_checkpointing", "learning_rate", "lr_scheduler_type",
    "max_grad_norm", "report_to", "save_steps", "save_total_limit", "seed", "warmup_steps", "weight_decay",
}  # fmt: skip


def main() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - INHERITED
    recorded = {
        config.__name__: {
            field.name: default_of(field, config) for field in dataclasses.fields(config) if field.name not in inherited
        }
        for config in (GRPOConfig, OnlineDPOConfig)
    }
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


def default_of(field: dataclasses.Field[Any], config: type[Any]) -> Any:
    """Return the option's default. None means that TRL derives the value from other options."""
    if field.name == "bf16":  # the default is None, which __post_init__ changes to True
        return True
    if field.default_factory is not dataclasses.MISSING:
        (value,) = field.default_factory()
        return value
    return field.default


if __name__ == "__main__":
    main()
