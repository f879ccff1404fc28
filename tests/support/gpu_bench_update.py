"""Cases of tests/bench/gpu.py: time and memory of an update."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Qwen2Config

from support import gpu
from support.gpu_updates import config_of, learner_of, random_groups
from support.shapes import config_of as shape_of
from support.shapes import write_model
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.learner.learner import Learner

PROMPTS, COMPLETIONS, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 8, 128, 256
WARM_UP, MEASURED = 1, 3
USABLE = 0.92
"""Share of the card's memory that a case may need according to `tandem doctor`. Larger cases are skipped."""
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "each row computes its prompt": {"learner": {"shared_prompts": "never"}},
    "gradient checkpointing": {"learner": {"gradient_checkpointing": True}},
    "LoRA r=16": {"lora": {"r": 16}},
    "4096 tokens per micro-batch": {"learner": {"max_tokens_per_micro_batch": 4096}},
    "16384 tokens per micro-batch": {"learner": {"max_tokens_per_micro_batch": 16_384}},
}


def cases(shapes: list[str], folder: Path) -> list[tuple[str, Callable[[], dict[str, object]]]]:
    """An update with each of `OPTIONS`. The 7B shape is left out: AdamW's state does not fit on one card."""
    return [
        (f"update {shape}, {name}", partial(_measure, shape, folder / shape, options))
        for shape in shapes
        if shape != "7B"
        for name, options in OPTIONS.items()
    ]


class Updates(NamedTuple):
    """A learner and a batch."""

    learner: Learner
    update: Callable[[], object]
    tokens: int
    rows: int
    unshared_because: str | None


@contextmanager
def updates_of(shape: str, model_dir: Path, options: dict[str, Any]) -> Iterator[Updates]:
    config = config_of(**options)
    groups = random_groups(
        prompts=2 if shape == "tiny" else PROMPTS,
        completions=2 if shape == "tiny" else COMPLETIONS,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=COMPLETION_TOKENS,
        vocab=shape_of(shape).vocab_size,
    )
    gpu.reset_peak()
    with gpu.accelerator(config) as accelerator:
        algorithm = Grpo(config)
        learner = learner_of(model_dir, config, accelerator)
        batch = algorithm.make_batch(groups)
        rows, length = batch.token_ids_BS.shape
        yield Updates(learner, lambda: learner.update(batch, algorithm), rows * length, rows, learner.unshared_because)


def in_bfloat16(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"learner": {"dtype": "bfloat16"} | options.get("learner", {})}


def _measure(shape: str, model_dir: Path, options: dict[str, Any]) -> dict[str, object]:
    options = in_bfloat16(options)
    if not model_dir.is_dir():
        write_model(shape, model_dir, gpu.device())
    estimate, memory = _doctors_estimate(model_dir, options), gpu.memory_bytes()
    if memory and estimate > USABLE * memory:
        return {"skipped": f"needs {estimate / 2**30:.0f} GiB, and the card has {memory / 2**30:.0f} GiB"}
    with updates_of(shape, model_dir, options) as updates:
        seconds = [gpu.timed(updates.update) for _ in range(WARM_UP + MEASURED)]
        unshared_because = updates.unshared_because
    update_s = statistics.median(seconds[WARM_UP:])
    tflops = update_flops(shape_of(shape), rows=updates.rows, lora="lora" in options) / update_s / 1e12
    card = gpu.peak_tflops()
    return {
        "update_s": update_s,
        "first_update_s": seconds[0],
        "tokens": updates.tokens,
        "tokens_per_s": updates.tokens / update_s,
        "TFLOP_per_s": tflops,
        "MFU": tflops / card if card else None,
        "peak_GiB": gpu.peak_bytes() / 2**30,
        "peak_per_doctors_estimate": gpu.peak_bytes() / estimate,
        "prompts": unshared_because or "shared",
    }


def update_flops(config: Qwen2Config, *, rows: int, lora: bool) -> float:
    """Floating-point operations that an update needs: recomputed ones, norms and the optimizer are not counted.

    Forward: 2 per weight and token of the layers, 2 per weight of the output embedding and sampled token, and
    2 × S² × heads × head size per row for causal attention. Backward: twice as much; with LoRA, the same for weights.
    """
    tokens = rows * (PROMPT_TOKENS + COMPLETION_TOKENS)
    head_dim = config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    matrices = 2 * (
        config.num_hidden_layers * layer * tokens + config.vocab_size * config.hidden_size * rows * COMPLETION_TOKENS
    )
    squares = 2 * config.num_hidden_layers * rows * (PROMPT_TOKENS + COMPLETION_TOKENS) ** 2 * config.hidden_size
    return matrices * (2 if lora else 3) + squares * 3


def _doctors_estimate(model_dir: Path, options: dict[str, Any]) -> float:
    from support.facts import on_gpus, settings
    from tandem_cli.doctor.checks.memory import trainer_need
    from tandem_cli.doctor.model import read_model

    facts = replace(on_gpus(), model=read_model(model_dir), settings=settings(trainer=options))
    return trainer_need(facts).size_bytes
