"""Write architectures.md from architectures.json (`make docs`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import code, table

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
"""Family → well-known models."""

REASONS = {
    "uses multi-head latent attention": "vLLM's CPU build computes other logprobs than transformers before any update",
    "cannot load": "vLLM's CPU build cannot load it",
    "its engine ended in the first rollouts": "vLLM's CPU build cannot compute it",
    "failed to be inspected": "vLLM imports torchvision for it, which its CPU build lacks",
    "cannot be switched while it is loaded": "vLLM does not load all of its published weights",
    "Trainer and generators differ": "transformers and vLLM's CPU build compute different logprobs",
    "validate_layer_type": "vLLM's check of its configuration refuses what transformers writes",
    "--mamba-block-size can only be set": "vLLM sets options for it that exclude each other",
    "changes its logits after the output embedding": "the trainer does not know what its head does",
    "separate output embedding": "transformers does not tell its head from its body",
}
"""Part of a message → the reason in short."""

HEAD = """\
# Model families

Written by `docs/reference/make_architectures.py` from `docs/reference/architectures.json`. The script
`tests/golden/record_architectures.py` measures these results.

This page covers every family of causal language models that both transformers and vLLM have. A tiny random model of
each family goes through a short run, in float32 and with vLLM's CPU build. Trainer and generator load it. The generator
samples, the trainer computes the logprobs of the same tokens, learns, and publishes to the running generator, which
samples again. This happens twice. `before` and `after` are the largest difference between the two logprobs of one
token, in nats, before the first update and after both.

Some families have a second row. In a *tied* model, the output embedding is the input embedding (`tie_word_embeddings`).
The first row has the family's default, and the second has the other choice.

- **trained**: the two sides agree up to rounding, before and after.
- **alerted**: the model is trained, but the two sides differ by more than rounding, and the run reports it. A
  difference above `trainer.max_mismatch` ends a run. These families are not refused, because their mean difference per
  token is below that: the code of transformers and of vLLM differs, and the alert
  [`mismatch`](../train/alerts.md#mismatch) leaves the decision to you.
- **refused**: a service stops, when it starts or in the first steps, and says why. The last column has the
  reason in short.

A family that is not in the table, such as one with its own code (`shared.trust_remote_code`), is tried as well. When it
starts, the generator overwrites all weights with NaN, loads the model's own weights as it would load a version, and
compares each tensor: the sum of all bit patterns, and the bytes of about 4,096 of its elements. It refuses a model that
this does not restore, and names a tensor. The comparison keeps no copy of the model; it needs 0.3 GB.

- **Mixtures of experts** are trained like other models, except with LoRA: the generator refuses adapters for them. The
  loss of the router (`router_aux_loss_coef`) is not used.
- **Quantized** models are refused, because vLLM converts their weights when it loads them.
- **Multi-head latent attention** (DeepSeek-V2 and V3) is refused on all devices. Before any update, the logprobs of
  vLLM's CPU build already differ from those of transformers. It has not been tried on GPUs.

On a GPU, vLLM has kernels that its CPU build lacks (Mamba's, for example). So a family that is refused here for that
reason may work there. The checks are the same, so a model that does not work is refused there too.

If the two sides would treat positions differently, the trainer follows vLLM. With `longrope` it uses the long factors
for every row if `generator.max_model_len` is above the model's original length, and the short factors otherwise. With
`dynamic` RoPE and with Cohere 2's sliding window, rows may not be longer than the length up to which both sides agree.
"""

COLUMNS = ["`model_type`", "models", "outcome", "before:", "after:", "reason"]


def page() -> str:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    families = [result for family, result in results.items() if ", " not in family]
    counts = {word: sum(r["outcome"] == word for r in families) for word in ("trained", "alerted", "refused")}
    summary = ", ".join(f"{number} {word}" for word, number in counts.items())
    return f"{HEAD}\n{len(families)} families: {summary}.\n" + table(COLUMNS, map(_row, results, results.values()))


def _row(family: str, result: dict[str, Any]) -> list[str]:
    message = result["reason"].replace("'MODEL'", "the model")
    reason = next((short for part, short in REASONS.items() if part in message), message)
    figures = [_figure(result[key]) for key in ("before", "after")]
    name, _, tying = family.partition(", ")
    model_type = f"{code(name)}, {tying}" if tying else code(name)
    return [model_type, "" if tying else MODELS.get(name, ""), result["outcome"], *figures, reason]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


if __name__ == "__main__":
    Path(__file__).with_name("architectures.md").write_text(page())
