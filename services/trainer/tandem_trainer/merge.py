"""`python -m tandem_trainer.merge ADAPTER TO`: merge an adapter and its base model into one Hugging Face folder."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from tandem_protocol.config import SharedConfig
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME

from .learner.model import load_model
from .learner.model_files import ModelFiles
from .learner.safetensors_file import write_safetensors
from .learner.shards import model_table, model_tensors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem_trainer.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", type=Path, help="the adapter's folder, such as runs/NAME/checkpoints/000020/model")
    parser.add_argument("to", type=Path, help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="dtype of the weights to write (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code from the base model's repository"
    )
    arguments = parser.parse_args(argv)
    try:
        merge(arguments.adapter, arguments.to, arguments.dtype, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(adapter: Path, to: Path, dtype: str, *, trust_remote_code: bool = False) -> None:
    """Add `adapter` to the weights of its base model, and write the result to `to`.

    The base model is the `shared.model` of the run. A relative path is looked up in the current folder.

    Raises:
        ValueError: `adapter` is not an adapter's folder, or `to` exists.
        OSError: the base model cannot be loaded, or `to` cannot be written.
    """
    if not (adapter / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{adapter} has no {ADAPTER_CONFIG_NAME}, expected the model folder of a LoRA run's checkpoint"
        )
    if to.exists():
        raise ValueError(f"{to} exists, expected a folder that does not exist yet")
    config = PeftConfig.from_pretrained(str(adapter))
    shared = SharedConfig(
        model=str(config.base_model_name_or_path), revision=config.revision, trust_remote_code=trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(
        shared.model, revision=shared.revision, trust_remote_code=trust_remote_code
    )
    base = load_model(shared.model, shared)
    files = ModelFiles(base, tokenizer, shared, dtype)
    # The sum is computed in float32, as in training, and rounded once when it is written.
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    staging = to.with_name(f".{to.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # left by a merge that was interrupted
    files.copy_to(staging)
    table = model_table(model, getattr(torch, dtype))
    tensors = (tensor for _, tensor in model_tensors(model, getattr(torch, dtype)))
    write_safetensors(staging / "model.safetensors", table, tensors)
    staging.replace(to)


if __name__ == "__main__":
    sys.exit(main())
