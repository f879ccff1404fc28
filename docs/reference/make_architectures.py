"""Write architectures.md from architectures.json: `.venv/bin/python docs/reference/make_architectures.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("architectures.json")
MODELS = {
    "afmoe": "Arcee Trinity", "apertus": "Apertus", "arcee": "AFM", "axk1": "A.X K1", "bloom": "BLOOM, BLOOMZ",
    "cohere": "Command R, R+", "cohere2": "Command R7B, Command A", "cohere2_moe": "", "cwm": "Code World Model",
    "dbrx": "DBRX", "deepseek_v2": "DeepSeek-V2", "deepseek_v3": "DeepSeek-V3, R1", "deepseek_v32": "DeepSeek-V3.2",
    "ernie4_5": "ERNIE 4.5 0.3B", "ernie4_5_moe": "ERNIE 4.5", "exaone4": "EXAONE 4.0", "exaone_moe": "K-EXAONE",
    "falcon": "Falcon", "falcon_h1": "Falcon-H1", "falcon_mamba": "Falcon Mamba", "flex_olmo": "FlexOlmo",
    "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 1B, 270M", "gemma3n_text": "Gemma 3n",
    "gemma4_text": "Gemma 4", "glm": "GLM-4 9B", "glm4": "GLM-4-0414", "glm4_moe": "GLM-4.5, 4.6",
    "glm4_moe_lite": "GLM-4.7-Flash", "glm_moe_dsa": "GLM-5", "gpt-sw3": "GPT-SW3", "gpt2": "GPT-2, DistilGPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder", "gpt_neox": "Pythia, GPT-NeoX, Dolly", "gpt_oss": "gpt-oss",
    "gptj": "GPT-J", "granite": "Granite 3", "granitemoe": "Granite 3 MoE", "granitemoehybrid": "Granite 4.0",
    "hunyuan_v1_dense": "Hunyuan 0.5B–7B", "hunyuan_v1_moe": "Hunyuan-A13B", "hyperclovax": "HyperCLOVA X SEED",
    "jais2": "Jais 2", "jamba": "Jamba", "kimi_linear": "Kimi Linear", "lfm2": "LFM2", "lfm2_moe": "LFM2-8B-A1B",
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama", "llama4_text": "Llama 4",
    "longcat_flash": "LongCat-Flash", "mamba": "Mamba", "mamba2": "Mamba 2, Codestral Mamba", "mellum": "Mellum 2",
    "mimo_v2_flash": "MiMo-V2-Flash", "minicpm3": "MiniCPM3", "minimax_m2": "MiniMax-M2",
    "ministral3": "Ministral 3", "mistral": "Mistral 7B, Nemo, Small", "mixtral": "Mixtral", "nemotron": "Nemotron 4",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2", "olmo": "OLMo", "olmo2": "OLMo 2", "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo Hybrid", "olmoe": "OLMoE", "opt": "OPT", "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", "qwen2": "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B", "qwen3": "Qwen3 0.6B–32B", "qwen3_5_moe_text": "Qwen3.5 MoE",
    "qwen3_5_text": "Qwen3.5", "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B", "qwen3_next": "Qwen3-Next",
    "seed_oss": "Seed-OSS", "smollm3": "SmolLM3", "stablelm": "StableLM 2, 3B",
    "starcoder2": "StarCoder2", "vaultgemma": "VaultGemma", "zamba2": "Zamba2",
    "bitnet": "BitNet b1.58", "biogpt": "BioGPT", "ctrl": "CTRL", "doge": "Doge", "helium": "Helium",
    "ministral": "Ministral 8B", "nanochat": "nanochat", "persimmon": "Persimmon", "deepseek_v4": "DeepSeek-V4",
    "gemma4_unified_text": "Gemma 4",
}  # fmt: skip
"""Family → models that people know."""

REASONS = {
    "is a mixture of experts": "a mixture of experts",
    "cannot load": "vLLM's CPU build cannot load it",
    "its engine ended in the first rollouts": "vLLM's CPU build cannot compute it",
    "failed to be inspected": "vLLM imports torchvision for it, which its CPU build lacks",
    "that these weights do not reach": "vLLM computes with products of its weights, which a switch would not reach",
    "Trainer and generators differ": "transformers and vLLM's CPU build compute different logprobs",
    "changes its logits after the output embedding": "the trainer does not know what its head does",
    "has no body apart": "transformers does not tell its head from its body",
}
"""Part of a message → what it comes to."""

HEAD = """\
# Model families

Written by `docs/reference/make_architectures.py` from `docs/reference/architectures.json`, which
`tests/golden/record_architectures.py` measures.

A tiny random model of each family of causal language models that transformers and vLLM both have goes through a run, in
float32 and with vLLM's CPU build: both sides load it, the generator samples, the trainer computes the logprobs of the
same tokens, learns, and publishes into the live generator, which samples again. `before` and `after` are the largest
differences between the two sides' logprobs of one token, in nats, before and after that update.

- **trained**: the two sides agree up to rounding, before and after.
- **alerted**: it is trained, but the two sides differ by more than rounding, and the run says so. A difference above
  `trainer.max_mismatch` ends a run.
- **refused**: one of the services says at its start why it does not work. The reason is what its message comes to.

What a GPU changes: vLLM has kernels there that its CPU build lacks (Mamba's, for example), so a family that is refused
here for that reason may work. The checks are the same, so what does not work is refused there too.

Where the sides depend on a length, the trainer follows vLLM. `longrope` uses its long factors for every row if
`generator.max_model_len` is above the model's original length, and its short ones otherwise. With `dynamic` RoPE and
with Cohere 2's sliding window, rows may not be longer than the length up to which both sides agree.
"""


def page() -> str:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    counts = {word: sum(r["outcome"] == word for r in results.values()) for word in ("trained", "alerted", "refused")}
    summary = ", ".join(f"{number} {word}" for word, number in counts.items())
    head = f"{HEAD}\n{len(results)} families: {summary}.\n\n| `model_type` | models | | before | after | reason |\n"
    return head + "|---|---|---|---|---|---|\n" + "".join(map(_row, results, results.values()))


def _row(family: str, result: dict[str, Any]) -> str:
    cells = [
        f"`{family}`",
        MODELS.get(family, ""),
        result["outcome"],
        *(_figure(result[key]) for key in ("before", "after")),
    ]
    message = result["reason"].replace("|", "\\|").replace("'MODEL'", "the model")
    reason = next((short for part, short in REASONS.items() if part in message), message)
    return f"| {' | '.join([*cells, reason])} |\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


if __name__ == "__main__":
    Path(__file__).with_name("architectures.md").write_text(page())
