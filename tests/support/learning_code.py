"""Try out the losses, advantages and algorithms on the page about them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from support.blocks import Block, blocks
from tandem_protocol.config.trainer import TrainerConfig
from tandem_trainer import algorithms

PAGE = "docs/integrate/losses.md"
MODULE = "losses"
"""Name of the module that the Python of PAGE stands for."""


def check(block: Block, base: Mapping[str, Any]) -> None:
    """Run a block of Python, and load what it defines with the block of YAML that names it.

    Args:
        base: completes the configuration of the trainer.
    """
    module = sys.modules[MODULE]
    exec(compile(block.text, str(block), "exec"), module.__dict__)
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == MODULE]
    assert defined
    for name in defined:
        configs = [one for one in blocks(block.page, language="yaml") if re.search(rf"\b{MODULE}:{name}\b", one.text)]
        assert len(configs) == 1, f"{block}: one block of YAML must name {MODULE}:{name}"
        trainer = {**base, **yaml.safe_load(configs[0].text)["trainer"]}
        algorithms.load(TrainerConfig.model_validate(trainer), torch.device("cpu"))
