"""Does the model fit? Estimates of the memory that each service needs, in bytes.

They follow from the model's shape. Python, its libraries and a device's context come on top, about 1 GiB per process.
Symbols: P parameters, L layers, H hidden size, V vocabulary size, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from tandem_protocol.config.learning import LearnerConfig

from ..facts import GENERATOR, TRAINER, MachineFacts, Model
from ..finding import Finding, count, fail, gib, ok, warn
from ..unknown import known
from .cpus_and_gpus import gpus_of

VLLM_UTILIZATION = 0.92
"""vLLM 0.32's default of gpu_memory_utilization: the share of a device's memory that it takes. It applies to the CPU as
well, unless the size of the KV cache is set."""
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
TIGHT = 0.9
"""A need above this share of the room gives a warning."""


class Need(NamedTuple):
    """The memory that a service needs."""

    size_bytes: float
    text: str
    """The arithmetic behind it."""


def generator(facts: MachineFacts) -> Finding:
    """Check that the weights and the KV cache of one request fit: into vLLM's share of each GPU, or into memory."""
    need = generator_need(facts)
    if _on_gpu(facts, GENERATOR):
        share = known(facts.settings).generator.gpu_memory_utilization or VLLM_UTILIZATION
        fix = "use more GPUs (`tandem gpus`), a smaller generator.max_model_len, or a smaller model"
    else:
        share = 1.0
        fix = f'set generator.env: {{{KV_SPACE}: "4"}} (GiB) in config.yaml, or use a smaller model'
    return _compare(need, facts, GENERATOR, share, fix)


def trainer(facts: MachineFacts) -> Finding:
    """Check that parameters, gradients, AdamW's two moments and the activations of one micro-batch fit."""
    fix = (
        "in trainer.learner set gradient_checkpointing: true or a smaller max_tokens_per_micro_batch; or use a smaller "
        "model or larger devices"
    )
    return _compare(trainer_need(facts), facts, TRAINER, 1.0, fix)


def generator_need(facts: MachineFacts) -> Need:
    """Estimate what each rank of the generator needs.

    On a GPU: P × width / tensor_parallel_size for the weights + 2 × L × KV heads × head size × width × T for the KV
    cache of one request, where width is the bytes per value and T is max_model_len.

    On the CPU: the weights and a cache of VLLM_CPU_KVCACHE_SPACE GiB. Without that variable vLLM takes its share of all
    memory.
    """
    config = known(facts.settings).generator
    if config.engine == "mock":
        return Need(0, "the mock engine holds no model")
    model = known(facts.model)
    width = 4 if config.dtype == "float32" else 2
    ranks = config.tensor_parallel_size if _on_gpu(facts, GENERATOR) else 1  # on the CPU all ranks share one memory
    weights = model.parameters * width / ranks
    divided = f" / {ranks}" if ranks > 1 else ""
    text = f"{count(model.parameters)} × {width} B{divided} = {gib(weights)} weights"
    if not _on_gpu(facts, GENERATOR):
        return _with_cpu_cache(facts, weights, text)
    tokens = min(config.max_model_len or model.max_positions, model.max_positions)
    heads = max(1, model.kv_heads / ranks)
    cache = 2 * model.layers * heads * model.head_dim * width * tokens
    what = f"2 × {model.layers} layers × {heads:g} KV heads × {model.head_dim} × {width} B × {tokens} tokens"
    return Need(weights + cache, f"{text} + {what} = {gib(cache)} KV cache for one request")


def _with_cpu_cache(facts: MachineFacts, weights: float, text: str) -> Need:
    config = known(facts.settings).generator
    env = {**config.env, **known(facts.stack).services[GENERATOR].env}
    if env.get(KV_SPACE, "").isdecimal():
        cache = int(env[KV_SPACE]) << 30
        return Need(weights + cache, f"{text} + {gib(cache)} KV cache ({KV_SPACE})")
    share = config.gpu_memory_utilization or VLLM_UTILIZATION
    taken = share * known(facts.engine).memory_bytes
    text = f"{KV_SPACE} is not set, so vLLM takes {share:g} of all memory: {gib(taken)}"
    return Need(max(weights, taken), text)


def trainer_need(facts: MachineFacts) -> Need:
    """Estimate what the trainer needs on a device.

    A process holds, in bytes, its parameters and optimizer (`state_bytes`) and the most of what exists during an update
    (`update_bytes`).

    On the CPU all processes share one memory, which also holds the copy of the weights (`copy_bytes`).
    """
    learner = known(facts.settings).trainer.learner
    on_gpu = _on_gpu(facts, TRAINER)
    tokens = learner.max_tokens_per_micro_batch or (8192 if on_gpu else 1024)
    state, what = state_bytes(facts)
    activations = update_bytes(facts, tokens)
    per_device = 1 if on_gpu else trainer_processes(facts)
    text = f"{what} + {gib(activations)} activations of {tokens} tokens"
    text = f"{per_device} × ({text})" if per_device > 1 else text
    copy = 0 if on_gpu else copy_bytes(facts)
    text += f" + {gib(copy)} copy of the weights" if copy else ""
    return Need(per_device * (state + activations) + copy, text)


def state_bytes(facts: MachineFacts) -> tuple[int, str]:
    """Estimate the bytes of parameters, gradients and optimizer, and say how.

    Full training:
        P × 16: float32 parameters (4), gradients (4) and AdamW's moments (8).
        P × 2 more for a bfloat16 copy of the parameters, if learner.dtype is bfloat16.
        P × 2 more, then, if prompts are computed once: the prompts keep the copy that they were computed with.
        P × 4 more for a reference model, if grpo.beta is above 0.
        P × 4 more for the buffers that exchange gradients, if there are several processes.

    LoRA: P × 4 for the frozen parameters and P × 2 for each of these copies. A × 16, or A × 20 with several processes,
    for the A parameters of an adapter of all linear layers.
    """
    config = known(facts.settings).trainer
    model = known(facts.model)
    exchange = 4 * (trainer_processes(facts) > 1)
    copies = 2 * (config.learner.dtype == "bfloat16") * (1 + _shares_prompts(facts))
    if not config.lora:
        width = 16 + copies + 4 * (config.grpo.beta > 0) + exchange
        size = model.parameters * width
        return size, f"{count(model.parameters)} × {width} B = {gib(size)} parameters, gradients, optimizer"
    width = 4 + copies
    adapter = config.lora.r * model.layers * (9 * model.hidden + 2 * model.kv_heads * model.head_dim)
    adapter += config.lora.r * model.layers * 3 * model.intermediate
    size = model.parameters * width + adapter * (16 + exchange)
    return size, (
        f"{count(model.parameters)} × {width} B + {count(adapter)} × {16 + exchange} B = {gib(size)} parameters; "
        "gradients and optimizer of the adapter"
    )


def update_bytes(facts: MachineFacts, tokens: int) -> int:
    """Estimate the bytes that exist only during an update with micro-batches of `tokens` tokens.

    They are the activations (`token_bytes`), and for the output embedding:
        logprob_chunk_size × V × 4 for the logits of one chunk; softmax and gradient reuse their memory. With bfloat16,
        × 6 instead of × 4.
        V × H × 8 for its gradient from one chunk, which is added to that of the others. With bfloat16, × 4. With LoRA
        there is none.
    """
    config = known(facts.settings).trainer
    model = known(facts.model)
    is_wide = config.learner.dtype == "float32"
    logits = config.learner.logprob_chunk_size * model.vocab * (4 if is_wide else 6)
    gradients = 0 if config.lora else model.vocab * model.hidden * (8 if is_wide else 4)
    return tokens * token_bytes(model, config.learner) + logits + gradients


def _shares_prompts(facts: MachineFacts) -> bool:
    """Whether prompts are computed once in a cache, as far as the settings say. Some models cannot."""
    learner = known(facts.settings).trainer.learner
    is_sharded = learner.parallelism == "fsdp2" and trainer_processes(facts) > 1
    return learner.shared_prompts == "auto" and not learner.gradient_checkpointing and not is_sharded


def copy_bytes(facts: MachineFacts) -> int:
    """Return the size of the copies of the weights from which a version is published.

    They are in the host's memory, also of a trainer on GPUs: P × 4, or P × 2 if learner.dtype is bfloat16, for all
    processes together. A trainer on CPUs has no copy with max_lag 0. That of an adapter is small. With
    `publish.delta: always`, there is also a copy of the version before.
    """
    config = known(facts.settings).trainer
    if config.lora:
        return 0
    is_copied = config.max_lag > 0 or _on_gpu(facts, TRAINER)
    width = 4 if config.learner.dtype == "float32" else 2
    return known(facts.model).parameters * width * (is_copied + publishes_deltas(facts, "always"))


def publishes_deltas(facts: MachineFacts, mode: str) -> bool:
    """Whether versions are published as deltas with this mode of publish.delta."""
    config = known(facts.settings).trainer
    return config.publish.delta == mode and config.learner.dtype == "bfloat16" and not config.lora


def made_bytes(facts: MachineFacts) -> int:
    """Return the size of the files that the generators make out of deltas: two versions of P × 2 per replica.

    They are in generator.materialize_dir, which is memory by default.
    """
    replicas = known(facts.stack).services[GENERATOR].replicas
    return 2 * 2 * known(facts.model).parameters * replicas


def optional_bytes(facts: MachineFacts) -> int:
    """Return what deltas take if `auto` chooses them: the trainer's copy, and the generators' files.

    It does not choose them without this memory, or on a weights volume in memory.
    """
    volume = known(facts.stack).volumes.get("weights")
    if not publishes_deltas(facts, "auto") or (volume is not None and volume.options is not None):
        return 0
    return 2 * known(facts.model).parameters + made_bytes(facts)


def token_bytes(model: Model, learner: LearnerConfig) -> int:
    """Estimate the bytes that autograd keeps per token.

    In float32 it is 32 H + 8 K + 16 I per layer. K is KV heads × head size, and I the intermediate size of a gated MLP.
    In bfloat16 it is 30 H + 4 K + 8 I, since norms and residuals stay in float32. With gradient_checkpointing it is the
    amount of one layer, plus the input of every layer: 4 H.

    Source: measured for Llama and Qwen2; tests/unit/test_doctor_memory.py measures Llama again.
    """
    keys = model.kv_heads * model.head_dim
    in_float32 = 32 * model.hidden + 8 * keys + 16 * model.intermediate
    in_bfloat16 = 30 * model.hidden + 4 * keys + 8 * model.intermediate
    layer = in_float32 if learner.dtype == "float32" else in_bfloat16
    if learner.gradient_checkpointing:
        return layer + model.layers * 4 * model.hidden
    return model.layers * layer


def trainer_processes(facts: MachineFacts) -> int:
    """Return TANDEM_TRAINER_PROCESSES of the trainer's service; 1 by default."""
    text = known(facts.stack).services[TRAINER].env.get("TANDEM_TRAINER_PROCESSES", "1")
    return int(text) if text.isdecimal() else 1


def on_host_bytes(facts: MachineFacts) -> int:
    """Return the host memory for all replicas of the services on the CPU, and for copies of the weights."""
    services = known(facts.stack).services
    needs = {GENERATOR: generator_need, TRAINER: trainer_need}
    on_cpu = (name for name in needs if not _on_gpu(facts, name))
    copy = copy_bytes(facts) if _on_gpu(facts, TRAINER) else 0
    made = made_bytes(facts) if publishes_deltas(facts, "always") else 0
    return int(sum(needs[name](facts).size_bytes * services[name].replicas for name in on_cpu)) + copy + made


def _on_gpu(facts: MachineFacts, service: str) -> bool:
    return bool(known(facts.stack).services[service].devices)


def _compare(need: Need, facts: MachineFacts, service: str, share: float, fix: str) -> Finding:
    if not need.size_bytes:
        return ok(need.text)
    if _on_gpu(facts, service):
        smallest = min(gpu.memory_bytes for gpu in gpus_of(facts, service))
        room = smallest * share
        where = f"{gib(room)} on each GPU" + (f" ({share:g} × {gib(smallest)})" if share < 1 else "")
    else:
        room = known(facts.engine).memory_bytes
        where = f"{gib(room)} of memory"
    if need.size_bytes > room:
        return fail(f"got {where}, expected at least {gib(need.size_bytes)}: {need.text}", fix)
    message = f"needs {gib(need.size_bytes)} of {where}: {need.text}"
    if need.size_bytes > TIGHT * room:
        return warn(f"tight: {message}", fix)
    return ok(message)
