"""Find a project's mistakes before its prepare.py runs and before a model is downloaded."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from commands import CommandFailed, run_shown

from tandem_protocol.config import ConfigError, SharedConfig, load
from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.model_directory import check_model_directory
from tandem_protocol.processes import USER_ERROR
from tandem_protocol.quantization import quantization_problem

log = logging.getLogger("tandem_preflight")

ERROR_LINE = re.compile(r"^\S+ \S+ ERROR +", re.MULTILINE)
"""How a record of level ERROR begins in the trainer's log: date, time, level."""


def check_settings(config: Path) -> None:
    """Check the keys and values of all sections, and whether they fit together.

    Raises:
        ConfigError: one of them is wrong.
    """
    generator = load(GeneratorSettings, path=config)[0].generator
    trainer = load(TrainerSettings, path=config)[0].trainer
    trainer.check_processes(trainer_processes())
    completion = trainer.rollout.max_completion_length
    if generator.max_model_len is not None and generator.max_model_len <= completion:
        raise ConfigError(
            f"generator.max_model_len is {generator.max_model_len}, expected more than "
            f"trainer.rollout.max_completion_length, which is {completion}: it counts prompt and completion together. "
            "Fix: raise it, or lower the other."
        )


def trainer_processes() -> int:
    """The number of trainer processes. 1 if the variable is wrong, which the trainer reports."""
    text = os.environ.get("TANDEM_TRAINER_PROCESSES") or "1"
    return int(text) if text.isdecimal() and int(text) else 1


def check_model(project: Path, shared: SharedConfig) -> bool:
    """Check the files of a model that is in the project's folder. Returns False if it is not there.

    Raises:
        ConfigError: it is incomplete, damaged or quantized.
    """
    directory = project / shared.model
    if not directory.is_dir():
        return False
    check_model_directory(str(directory))
    if problem := quantization_problem(shared.model, directory):
        raise ConfigError(problem)
    return True


def check_inputs(project: Path) -> None:
    """Import the rewards, and read and tokenize the prompts. This takes seconds, and the tokenizer must be there.

    Prompts that are on the hub are left to the trainer: the network may fail, which is not a mistake.

    Raises:
        ConfigError: they are wrong.
    """
    trainer = load(TrainerSettings, path=project / "config.yaml")[0].trainer
    prompts = [trainer.prompts, *([trainer.eval.prompts] if trainer.eval else [])]
    if not all((project / one.source).exists() for one in prompts):
        return
    command = [sys.executable, "-m", "tandem_trainer", "--check-project", "--config", str(project / "config.yaml")]
    try:
        run_shown("the check of the project", command, project, HF_HUB_OFFLINE="1", TANDEM_LOG="text")
    except CommandFailed as error:
        if error.status != USER_ERROR:
            log.warning("%s", error)  # the trainer will try the same
            return
        problem = ERROR_LINE.split("\n".join(error.lines))[-1]
        raise ConfigError(problem) from error
