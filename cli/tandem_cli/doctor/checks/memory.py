"""Whether the model fits: what each service holds, in bytes.

Estimates from the model's shape, without what Python, its libraries and a device's own context take (about a GiB each).
P parameters, L layers, H hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from ..facts import GENERATOR, TRAINER, Facts, Model
from ..finding import Finding, count, fail, gib, ok, warn
from ..settings import LearnerPart
from ..unknown import known
from .cpus_and_gpus import gpus_of

VLLM_UTILIZATION = 0.92
"""Share of a device's memory that vLLM 0.32 takes unless gpu_memory_utilization says otherwise; on the CPU too, unless
the size of its KV cache is set."""
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
TIGHT = 0.9


class Need(NamedTuple):
    """How much, and the arithmetic behind it."""

    size_bytes: float
    text: str


def generator(facts: Facts) -> Finding:
    """Weights and the KV cache of one longest request fit into vLLM's share of each device; on the CPU, all fits."""
    need = generator_need(facts)
    fix = (
        "more GPUs (tandem gpus), a smaller generator.max_model_len, or a smaller model"
        if _on_gpu(facts, GENERATOR)
        else f'generator.env: {{{KV_SPACE}: "4"}} (GiB) in config.yaml, or a smaller model'
    )
    share = known(facts.settings).generator.gpu_memory_utilization or VLLM_UTILIZATION
    return _compare(need, facts, GENERATOR, share if _on_gpu(facts, GENERATOR) else 1.0, fix)


def trainer(facts: Facts) -> Finding:
    """Parameters, gradients, both moments of AdamW and the activations of one micro-batch fit."""
    fix = (
        "trainer.learner: gradient_checkpointing: true, a smaller max_tokens_per_micro_batch; or a smaller model, or "
        "larger devices"
    )
    return _compare(trainer_need(facts), facts, TRAINER, 1.0, fix)


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
    dtype, P × 4 for a reference model (grpo.beta), P × 4 for what several processes exchange gradients in, and the
    activations of max_tokens_per_micro_batch tokens. Logits exist for one chunk, in whose memory their softmax and
    gradient are computed: logprob_chunk_size × V × 4, and × 2 for a copy in bfloat16 where that is the dtype.
    """
    config, model, ranks = known(facts.settings).trainer, known(facts.model), trainer_processes(facts)
    learner, on_gpu = config.learner, _on_gpu(facts, TRAINER)
    tokens = learner.max_tokens_per_micro_batch or (8192 if on_gpu else 1024)
    extras = (2 * (learner.dtype == "bfloat16"), 4 * (config.grpo.beta > 0), 4 * (ranks > 1))
    state_width = 16 + sum(extras)
    state = model.parameters * state_width
    logits = learner.logprob_chunk_size * model.vocab * (4 if learner.dtype == "float32" else 6)
    activations = tokens * token_bytes(model, learner) + logits
    here = 1 if on_gpu else ranks
    text = (
        f"{count(model.parameters)} × {state_width} B = {gib(state)} parameters, gradients, optimizer + "
        f"{gib(activations)} activations of {tokens} tokens"
    )
    return Need(here * (state + activations), f"{here} × ({text})" if here > 1 else text)


def token_bytes(model: Model, learner: LearnerPart) -> int:
    """What autograd keeps of a token: in float32 32 H + 8 K + 16 I bytes a layer, where K is KV heads × head size and I
    the intermediate size of a gated MLP; in bfloat16 30 H + 4 K + 8 I, since norms and residuals stay in float32. With
    gradient_checkpointing it is one layer's worth, and the input of each: 4 H.

    Source: counted for Llama and Qwen2 (tests/unit/test_doctor_memory.py counts again).
    """
    keys = model.kv_heads * model.head_dim
    in_float32 = 32 * model.hidden + 8 * keys + 16 * model.intermediate
    in_bfloat16 = 30 * model.hidden + 4 * keys + 8 * model.intermediate
    layer = in_float32 if learner.dtype == "float32" else in_bfloat16
    return layer + model.layers * 4 * model.hidden if learner.gradient_checkpointing else model.layers * layer


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


def _compare(need: Need, facts: Facts, service: str, share: float, fix: str) -> Finding:
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
        return fail(message, fix)
    return warn(f"{message}: tight", fix) if need.size_bytes > TIGHT * room else ok(message)
