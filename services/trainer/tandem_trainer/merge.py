"""`python -m tandem_trainer.merge ADAPTER TO`: an adapter and its base as one plain Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from tandem_protocol.manifest import ADAPTER_CONFIG_NAME


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem_trainer.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", type=Path, help="such as runs/NAME/checkpoints/000020/model")
    parser.add_argument("to", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of what is written")
    arguments = parser.parse_args(argv)
    try:
        merge(arguments.adapter, arguments.to, getattr(torch, arguments.dtype))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(adapter: Path, to: Path, dtype: torch.dtype) -> None:
    """Add `adapter` to the weights that it was trained beside (shared.model, found from the current folder).

    Raises:
        ValueError: `adapter` is none, or `to` exists.
        OSError: the base cannot be loaded, or nothing can be written.
    """
    if not (adapter / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_CONFIG_NAME}; wanted the model folder of a LoRA run's checkpoint")
    if to.exists():
        raise ValueError(f"{to} exists; wanted a folder that does not")
    # Added up in float32, as it was trained, and rounded once.
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload()
    model.to(dtype).save_pretrained(to)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(to)


if __name__ == "__main__":
    sys.exit(main())
