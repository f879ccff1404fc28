"""Tell whoever starts the generators which model a script trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tandem_protocol.config import ConfigError
from tandem_protocol.script import NEEDS_ENV, ScriptNeeds


class Rehearsed(SystemExit):
    """The rehearsal of a script has ended, because the script has made its trainer."""


def announce(trainer: Any, *, is_rehearsal: bool) -> None:
    """Write what the generators must be to the file that `TANDEM_SCRIPT_NEEDS` names.

    Raises:
        ConfigError: the model has no name with which a generator could load it.
        Rehearsed: this is a rehearsal.
    """
    if file := os.environ.get(NEEDS_ENV):
        needs_of(trainer).write(Path(file))
    if is_rehearsal:
        raise Rehearsed(0)


def needs_of(trainer: Any) -> ScriptNeeds:
    """Return what the generators of a trainer must be.

    Raises:
        ConfigError: the model has no name.
    """
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ConfigError(
            f"got a {type(model).__name__} that was not loaded from a folder or from the hub, so no generator can load "
            "it. Fix: save it with its tokenizer, and load it with from_pretrained; or name a folder that has the same "
            "model, with `tandem run --model` or as shared.model in tandem.yaml."
        )
    length = getattr(trainer.args, "vllm_max_model_length", None)
    if Path(name).is_dir():
        return ScriptNeeds(str(Path(name).absolute()), max_model_len=length)
    is_remote = type(model).__module__.startswith("transformers_modules")
    revision = getattr(model.config, "_commit_hash", None)
    return ScriptNeeds(name, revision, trust_remote_code=is_remote, max_model_len=length)
