"""Record docs/reference/architectures.json: for every model family in both transformers and vLLM, whether it works.

It needs vLLM's CPU build and takes ten minutes. Afterwards, write the page from the records:

    PYTHONPATH=tests python tests/golden/record_architectures.py [FAMILY …]  # or 'llama, tied'
    python docs/reference/make_architectures.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, _TRANSFORMERS_SUPPORTED_MODELS

from support.architectures import tiny_config
from support.family_pool import RESULTS, judged

BACKEND = (
    "biogpt", "bitnet", "ctrl", "doge", "gemma4_unified_text", "helium", "ministral", "nanochat", "persimmon",
)  # fmt: skip
"""Families that are not in vLLM's registry but run on its Transformers backend."""


BOTH_WAYS = (
    "falcon", "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
"""Families that are recorded with tied and with untied embeddings."""


def families() -> list[str]:
    """Return the text models whose class is in vLLM's registry, and those of `BACKEND`."""
    known = {*_TEXT_GENERATION_MODELS, *_TRANSFORMERS_SUPPORTED_MODELS}
    with_text_model = {
        family.removesuffix("_text") for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if "_text" in family
    }
    listed = (
        family
        for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture in known and family not in with_text_model
    )
    return sorted({*listed, *BACKEND, *map(_with_other_tying, BOTH_WAYS)})


def _with_other_tying(family: str) -> str:
    return f"{family}, {'untied' if tiny_config(family).tie_word_embeddings else 'tied'}"


def main() -> None:
    requested = sys.argv[1:] or families()
    recorded: dict[str, Any] = json.loads(RESULTS.read_text()) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder, judged(requested, Path(folder)) as outcomes:
        for family, future in outcomes.items():
            outcome = future.result()
            print(f"{family:20} {outcome['outcome']:8} {outcome['seconds']:5} s  {outcome['reason'][:200]}", flush=True)
            if outcome["outcome"] == "failed":  # e.g. deepseek_v4: transformers cannot create a small model
                print((Path(folder) / family / "log").read_text()[-2000:])
                recorded.pop(family, None)
                continue
            recorded[family] = {"architecture": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.partition(", ")[0]]} | {
                key: _rounded(outcome[key]) for key in ("outcome", "reason", "before", "after")
            }
    RESULTS.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Round a figure to one significant digit, because further digits differ between runs."""
    return float(f"{value:.0e}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
