"""Write docs/reference/architectures.json: what becomes of every model family that transformers and vLLM both have.

Needs vLLM's CPU build and ten minutes: `PYTHONPATH=tests python tests/golden/record_architectures.py [FAMILY …]`. Then
`python docs/reference/make_architectures.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, _TRANSFORMERS_SUPPORTED_MODELS

from support.zygotes import RESULTS, judged

BACKEND = (
    "biogpt", "bitnet", "ctrl", "doge", "gemma4_unified_text", "helium", "ministral", "nanochat", "persimmon",
)  # fmt: skip
"""Not in vLLM's registry, but its Transformers backend takes them."""


def families() -> list[str]:
    """Text models of which vLLM's registry names the class, and `BACKEND`."""
    known = {*_TEXT_GENERATION_MODELS, *_TRANSFORMERS_SUPPORTED_MODELS}
    with_text_model = {
        family.removesuffix("_text") for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if "_text" in family
    }
    listed = (
        family
        for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture in known and family not in with_text_model
    )
    return sorted({*listed, *BACKEND})


def main() -> None:
    wanted = sys.argv[1:] or families()
    recorded: dict[str, Any] = json.loads(RESULTS.read_text()) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder, judged(wanted, Path(folder)) as outcomes:
        for family, future in outcomes.items():
            outcome = future.result()
            print(f"{family:20} {outcome['outcome']:8} {outcome['seconds']:5} s  {outcome['reason'][:200]}", flush=True)
            if outcome["outcome"] == "failed":  # such as deepseek_v4, of which transformers makes no small model
                print((Path(folder) / family / "log").read_text()[-2000:])
                recorded.pop(family, None)
                continue
            recorded[family] = {"architecture": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]} | {
                key: _rounded(outcome[key]) for key in ("outcome", "reason", "before", "after")
            }
    RESULTS.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """To one digit: the next run has others."""
    return float(f"{value:.0e}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
