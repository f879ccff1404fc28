"""Whether the model fits: what each service holds, in bytes.

Estimates from the model's shape, without what Python, its libraries and a device's own context take (about a GiB each).
P parameters, L layers, H hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from ..facts import GENERATOR, TRAINER, Facts, known
from ..finding import Finding, count, fail, gib, ok, warn
from .devices import gpus_of

VLLM_UTILIZATION = 0.92
"""Share of a device's memory that vLLM 0.32 takes unless gpu_memory_utilization says otherwise; on the CPU too, unless
the size of its KV cache is set."""
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
ACTIVATION_BYTES = 34
"""A layer keeps about 34 bytes per token and hidden unit for the backward pass, in 16 bit and without the attention
matrix, which fused attention does not keep. Source: Korthikanti et al. 2022, Reducing Activation Recomputation."""
TIGHT = 0.9


class Need(NamedTuple):
    """How much, and the arithmetic behind it."""

    size_bytes: float
    text: str


def generator(facts: Facts) -> Finding:
    """Weights and the KV cache of one longest request fit into vLLM's share of each device; on the CPU, all fits."""
    need = generator_need(facts)
    mend = (
        "more GPUs (tandem gpus), a smaller generator.max_model_len, or a smaller model"
        if _on_gpu(facts, GENERATOR)
        else f'generator.env: {{{KV_SPACE}: "4"}} (GiB) in config.yaml, or a smaller model'
    )
    share = known(facts.settings).generator.gpu_memory_utilization or VLLM_UTILIZATION
    return _compare(need, facts, GENERATOR, share if _on_gpu(facts, GENERATOR) else 1.0, mend)


def trainer(facts: Facts) -> Finding:
    """Parameters, gradients, both moments of AdamW and the activations of one micro-batch fit."""
    mend = (
        "trainer.learner: gradient_checkpointing: true, a smaller max_tokens_per_micro_batch; or a smaller model, or "
        "larger devices"
    )
    return _compare(trainer_need(facts), facts, TRAINER, 1.0, mend)


def generator_need(facts: Facts) -> Need:
    """P × bytes / tensor_parallel_size + 2 × L × KV heads × head size × bytes × T, with T = max_model_len on a GPU.

    On the CPU, vLLM takes the cache that VLLM_CPU_KVCACHE_SPACE names, or its share of all memory.
    """
    config = known(facts.settings).generator
    if config.engine == "mock":
        return Need(0, "the mock engine holds no model")
    model, width = known(facts.model), 4 if config.dtype == "float32" else 2
    ranks = config.tensor_parallel_size if _on_gpu(facts, GENERATOR) else 1  # on the CPU they share its memory
    weights = model.parameters * width / ranks
    text = (
        f"{count(model.parameters)} × {width} B" + (f" / {ranks}" if ranks > 1 else "") + f" = {gib(weights)} weights"
    )
    if not _on_gpu(facts, GENERATOR):
        return _with_cpu_cache(facts, weights, text)
    tokens = min(config.max_model_len or model.max_positions, model.max_positions)
    heads = max(1, model.kv_heads / ranks)
    cache = 2 * model.layers * heads * model.head_dim * width * tokens
    what = f"2 × {model.layers} layers × {heads:g} KV heads × {model.head_dim} × {width} B × {tokens} tokens"
    return Need(weights + cache, f"{text} + {what} = {gib(cache)} KV cache for one request")


def _with_cpu_cache(facts: Facts, weights: float, text: str) -> Need:
    config = known(facts.settings).generator
    env = {**config.env, **known(facts.stack).services[GENERATOR].env}
    if env.get(KV_SPACE, "").isdecimal():
        cache = int(env[KV_SPACE]) << 30
        return Need(weights + cache, f"{text} + {gib(cache)} KV cache ({KV_SPACE})")
    share = config.gpu_memory_utilization or VLLM_UTILIZATION
    taken = share * known(facts.engine).memory_bytes
    return Need(max(weights, taken), f"vLLM takes {share:g} of all memory where {KV_SPACE} is not set: {gib(taken)}")


def trainer_need(facts: Facts) -> Need:
    """A process holds P × (4 parameters + 4 gradients + 8 AdamW) bytes, P × 2 for copies in bfloat16 where that is the
    dtype, P × 4 for a reference model (grpo.beta), and for the backward pass L × T × H × 34 bytes in bfloat16, 68 in
    float32, with T = max_tokens_per_micro_batch. With gradient_checkpointing that is one layer's worth, and each
    layer's input. The logits of one chunk, their softmax and their gradients: 3 × logprob_chunk_size × V × 4.
    """
    config, model = known(facts.settings).trainer, known(facts.model)
    learner, wide = config.learner, 2 if config.learner.dtype == "float32" else 1
    state_width = 16 + (2 if learner.dtype == "bfloat16" else 0) + (4 if config.grpo.beta else 0)
    state, tokens = model.parameters * state_width, learner.max_tokens_per_micro_batch
    layer = tokens * model.hidden * ACTIVATION_BYTES * wide
    inputs = model.layers * tokens * model.hidden * 2 * wide
    activations = inputs + layer if learner.gradient_checkpointing else model.layers * layer
    logits = 3 * learner.logprob_chunk_size * model.vocab * 4
    processes = 1 if _on_gpu(facts, TRAINER) else trainer_processes(facts)
    text = (
        f"{count(model.parameters)} × {state_width} B = {gib(state)} parameters, gradients, optimizer + "
        f"{gib(activations + logits)} activations of {tokens} tokens"
    )
    return Need(processes * (state + activations + logits), f"{processes} × ({text})" if processes > 1 else text)


def trainer_processes(facts: Facts) -> int:
    text = known(facts.stack).services[TRAINER].env.get("TANDEM_TRAINER_PROCESSES", "1")
    return int(text) if text.isdecimal() else 1


def on_host_bytes(facts: Facts) -> int:
    """What the services that run on the CPU take of the host's memory."""
    services, needs = known(facts.stack).services, {GENERATOR: generator_need, TRAINER: trainer_need}
    on_cpu = (name for name in needs if not _on_gpu(facts, name))
    return int(sum(needs[name](facts).size_bytes * services[name].replicas for name in on_cpu))


def _on_gpu(facts: Facts, service: str) -> bool:
    return bool(known(facts.stack).services[service].devices)


def _compare(need: Need, facts: Facts, service: str, share: float, mend: str) -> Finding:
    if not need.size_bytes:
        return ok(need.text)
    if _on_gpu(facts, service):
        smallest = min(gpu.memory_bytes for gpu in gpus_of(facts, service))
        room = smallest * share
        where = f"{gib(room)} on each GPU" + (f" ({share:g} × {gib(smallest)})" if share < 1 else "")
    else:
        room = known(facts.engine).memory_bytes
        where = f"{gib(room)} of memory"
    message = f"{need.text}; {gib(need.size_bytes)} of {where}"
    if need.size_bytes > room:
        return fail(message, mend)
    return warn(f"{message}: tight", mend) if need.size_bytes > TIGHT * room else ok(message)
