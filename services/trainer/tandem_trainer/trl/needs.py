"""Tell whoever starts the generators which model a script trains."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from tandem_protocol.config import ConfigError
from tandem_protocol.script import NEEDS_ENV, ScriptNeeds

_JOINED_EXPERTS = re.compile(r"\.experts\.(?!\d)")
"""In names of parameters that hold all experts of a layer. Others have the number of their expert there."""


class Rehearsed(SystemExit):
    """The rehearsal of a script has ended, because the script has made its trainer."""


def announce(trainer: Any, *, is_rehearsal: bool) -> None:
    """Write what the generators must be to the file that `TANDEM_SCRIPT_NEEDS` names.

    Raises:
        ConfigError: the model has no name with which a generator could load it, or its weights cannot be sent.
        Rehearsed: this is a rehearsal.
    """
    if trainer is not None:
        refuse_joined_experts(_base_model(trainer))
    if file := os.environ.get(NEEDS_ENV):
        needs_of(trainer).write(Path(file))
    if is_rehearsal:
        raise Rehearsed(0)


def needs_of(trainer: Any) -> ScriptNeeds:
    """Return what the generators of a trainer must be.

    Raises:
        ConfigError: the model has no name.
    """
    model = _base_model(trainer)
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


def _base_model(trainer: Any) -> Any:
    return trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model


def refuse_joined_experts(model: Any) -> None:
    """Refuse a model whose parameters have other names than the tensors of its checkpoint, which generators load.

    TRL sends parameters. transformers 5 joins the experts of many models, but those of GPT-OSS are joined in its
    checkpoint too.

    Raises:
        ConfigError: The checkpoint has a tensor for each expert, and the model has one for all.
    """
    if not any(_JOINED_EXPERTS.search(name) for name, _ in model.named_parameters()):
        return
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has the parameters of the checkpoint
        return
    with torch.device("meta"):  # the parameters of `model` may be sharded
        table = dict(type(model)(model.config).named_parameters())
    if len(revert_weight_conversion(model, table)) != len(table):
        raise ConfigError(
            f"got a {type(model).__name__}, a mixture of experts, expected another model: TRL sends the experts of a "
            "layer as one tensor, and the generators expect one per expert. Fix: use Tandem's own trainer, which "
            "separates them."
        )
