"""The doctor's memory estimates, with exact numbers for sizes that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from support.facts import GIB, QWEN, UUIDS, changed, on_cpus, on_gpus, settings
from tandem_cli.doctor.checks import memory, storage
from tandem_cli.doctor.facts import Gpu, MachineFacts, Model, Nvidia, Volume
from tandem_cli.doctor.unknown import known
from tandem_protocol.config.learning import LearnerConfig
from tandem_trainer.devices import CPU_MAX_TOKENS, GPU_MAX_TOKENS
from tandem_trainer.learner.logprobs import TokenLogprobs

MODEL = Model(
    where="",
    parameters=1000,
    layers=3,
    hidden=8,
    intermediate=20,
    kv_heads=2,
    head_dim=4,
    vocab=100,
    max_positions=64,
)


def with_settings(facts: MachineFacts, **sections: Any) -> MachineFacts:
    return replace(facts, model=MODEL, settings=settings(**sections))


def generator_bytes(**options: Any) -> float:
    return memory.generator_need(with_settings(on_gpus(), generator=options)).size_bytes


def trainer_bytes(facts: MachineFacts | None = None, **options: Any) -> float:
    facts = facts or on_gpus()
    return memory.trainer_need(with_settings(facts, trainer=options)).size_bytes


def test_the_generator_needs_its_part_of_the_weights_and_the_cache_of_one_request() -> None:
    bytes_per_token = 2 * 3 * 2 * 4 * 2
    assert generator_bytes() == 2000 + 64 * bytes_per_token
    assert generator_bytes(max_model_len=16) == 2000 + 16 * bytes_per_token
    assert generator_bytes(dtype="float32") == 2 * generator_bytes()
    assert generator_bytes(tensor_parallel_size=2) == generator_bytes() / 2
    assert generator_bytes(tensor_parallel_size=4) == 500 + 64 * bytes_per_token / 2, "a KV head is not divided"


def test_on_the_cpu_the_cache_size_comes_from_the_environment_or_the_configuration() -> None:
    laptop = on_cpus()
    cache = memory.generator_need(with_settings(laptop, generator={"env": {memory.KV_SPACE: "2"}}))
    assert cache.size_bytes == 2000 + 2 * GIB
    by_environment = changed(laptop, "generator", env={memory.KV_SPACE: "3"})
    cache = memory.generator_need(with_settings(by_environment, generator={"env": {memory.KV_SPACE: "2"}}))
    assert cache.size_bytes == 2000 + 3 * GIB
    share = memory.generator_need(with_settings(laptop, generator={"gpu_memory_utilization": 0.5}))
    assert share.size_bytes == 8 * GIB


def test_the_trainer_needs_its_state_and_the_activations_of_a_micro_batch() -> None:
    learner = {"max_tokens_per_micro_batch": 10, "logprob_chunk_size": 5}
    layer = 10 * (32 * 8 + 8 * 8 + 16 * 20)
    logits = 5 * 100 * 4 + 100 * 8 * 8
    assert trainer_bytes(learner=learner) == 16_000 + 3 * layer + logits
    assert trainer_bytes(learner=learner, grpo={"beta": 0.1}) == 20_000 + 3 * layer + logits
    half = learner | {"dtype": "bfloat16"}
    half_layer, half_logits = 10 * (30 * 8 + 4 * 8 + 8 * 20), 5 * 100 * 6 + 100 * 8 * 4
    assert trainer_bytes(learner=half) == 20_000 + 3 * half_layer + half_logits
    assert trainer_bytes(learner=half | {"shared_prompts": "never"}) == 18_000 + 3 * half_layer + half_logits
    default = learner | {"max_tokens_per_micro_batch": None}
    assert trainer_bytes(learner=default) == 16_000 + 3 * GPU_MAX_TOKENS * layer / 10 + logits
    on_cpu = trainer_bytes(on_cpus(), learner=default, max_lag=0)
    assert on_cpu == 16_000 + 3 * CPU_MAX_TOKENS * layer / 10 + logits
    recomputed = learner | {"gradient_checkpointing": True}
    assert trainer_bytes(learner=recomputed) == 16_000 + layer + 3 * 10 * 8 * 4 + logits


def test_with_lora_only_the_adapter_has_gradients_and_moments() -> None:
    learner = {"max_tokens_per_micro_batch": 10, "logprob_chunk_size": 5}
    query, keys, output, mlp = 8 + 8, 2 * (8 + 2 * 4), 8 + 8, 3 * (8 + 20)
    adapter = 2 * 3 * (query + keys + output + mlp)
    needs = 4_000 + 16 * adapter + 3 * 10 * (32 * 8 + 8 * 8 + 16 * 20) + 5 * 100 * 4
    assert trainer_bytes(learner=learner, lora={"r": 2}) == needs
    assert trainer_bytes(learner=learner, lora={"r": 2}, grpo={"beta": 0.1}) == needs, "the model without adapter"
    assert (
        trainer_bytes(lora={"r": 2}, learner={"dtype": "bfloat16"})
        - trainer_bytes(lora={"r": 2}, learner={"dtype": "bfloat16", "shared_prompts": "never"})
        == 2_000
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("intermediate", "kv_heads"), [(344, 4), (746, 1)])
def test_the_estimated_activations_match_what_autograd_keeps(
    dtype: Literal["float32", "bfloat16"], checkpointing: bool, intermediate: int, kv_heads: int
) -> None:
    """Compares the growth from one layer to three. Copies of weights are not counted as activations."""
    learner = LearnerConfig(dtype=dtype, gradient_checkpointing=checkpointing)

    def kept_and_estimated(layers: int) -> tuple[float, int]:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=128,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=kv_heads,
            )
        )
        estimated = memory.token_bytes(Model("", 0, layers, 128, intermediate, kv_heads, 32, 64, 64), learner)
        return bytes_kept_per_token(model, learner), estimated

    few, many = kept_and_estimated(1), kept_and_estimated(3)
    assert many[0] - few[0] == pytest.approx(many[1] - few[1], rel=0.03)


def bytes_kept_per_token(model: LlamaForCausalLM, learner: LearnerConfig, tokens: int = 512) -> float:
    """Measure the bytes per token that autograd keeps for the backward pass, without parameters and their copies."""
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids_BS = torch.zeros(1, tokens, dtype=torch.long)
    policy = TokenLogprobs(model.train(), temperature=1.0, chunk_size=tokens)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=learner.dtype == "bfloat16"),
    ):
        policy(ids_BS, torch.tensor([1]), torch.ones(1, tokens - 1).bool())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


def test_trainer_processes_share_the_hosts_memory_but_each_has_its_gpu() -> None:
    laptop, host = (
        changed(facts, "trainer", env={"TANDEM_TRAINER_PROCESSES": "2"}) for facts in (on_cpus(), on_gpus())
    )
    tokens = {"max_tokens_per_micro_batch": 64}  # the default is smaller on CPUs
    assert trainer_bytes(laptop, learner=tokens, max_lag=0) == 2 * trainer_bytes(host, learner=tokens, max_lag=0)
    assert trainer_bytes(host) == trainer_bytes() + 4_000, "buffers for gradients"
    assert memory.trainer_need(with_settings(laptop, trainer={})).text.startswith("2 × (")
    assert not memory.trainer_need(with_settings(host, trainer={})).text.startswith("2 × (")


def test_a_version_that_is_published_behind_an_update_is_in_the_hosts_memory() -> None:
    laptop, host = on_cpus(), on_gpus()
    copies = {("float32", 1): 4_000, ("bfloat16", 1): 2_000, ("float32", 4): 4_000}
    for (dtype, max_lag), size_bytes in copies.items():
        options = {"learner": {"dtype": dtype}, "max_lag": max_lag}
        without = options | {"max_lag": 0}
        assert trainer_bytes(laptop, **options) - trainer_bytes(laptop, **without) == size_bytes
        assert trainer_bytes(host, **options) == trainer_bytes(host, **without), "the GPU does not hold it"
        assert memory.on_host_bytes(with_settings(host, trainer=options)) == size_bytes
        assert memory.on_host_bytes(with_settings(host, trainer=without)) == size_bytes, "the GPU copies into it"
    ranks = changed(laptop, "trainer", env={"TANDEM_TRAINER_PROCESSES": "2"})
    assert trainer_bytes(ranks) - trainer_bytes(ranks, max_lag=0) == 4_000, "each process copies its part"
    assert trainer_bytes(laptop, lora={"r": 4}) == trainer_bytes(laptop, lora={"r": 4}, max_lag=0)


def test_deltas_need_a_second_copy_in_the_trainer_and_two_versions_per_generator() -> None:
    for facts in (on_cpus(), on_gpus()):
        options: dict[str, Any] = {"learner": {"dtype": "bfloat16"}, "max_lag": 1}
        with_delta = options | {"publish": {"delta": "always"}}
        options |= {"publish": {"delta": "never"}}

        def on_host(facts: MachineFacts = facts, **trainer: Any) -> int:
            return memory.on_host_bytes(with_settings(facts, trainer=trainer))

        replicas = facts.stack.services["generator"].replicas  # type: ignore[union-attr]  # the facts have a stack
        assert on_host(**with_delta) - on_host(**options) == 2_000 + replicas * 2 * 2_000
        three = changed(facts, "generator", replicas=replicas + 1)
        assert on_host(three, **with_delta) - on_host(three, **options) == 2_000 + (replicas + 1) * 2 * 2_000
        full: dict[str, Any] = {"learner": {"dtype": "float32"}}
        assert on_host(**full, publish={"delta": "always"}) == on_host(**full), "float32 is never published as a delta"
        auto = options | {"publish": {"delta": "auto"}}
        on_disk: Any = replace(facts, stack=replace(known(facts.stack), volumes={"weights": Volume("weights", None)}))
        for where, optional in ((facts, 0), (on_disk, on_host(**with_delta) - on_host(**options))):
            assert on_host(where, **auto) == on_host(**options), "without that memory, auto publishes no deltas"
            assert memory.optional_bytes(with_settings(where, trainer=auto)) == optional
            large = replace(where, engine=replace(known(where.engine), memory_bytes=1 << 40))
            said = storage.memory(with_settings(large, trainer=auto)).message
            assert ("for deltas; without them, versions are published in full" in said) == (optional > 0)


def test_generators_on_the_cpu_share_the_hosts_memory() -> None:
    laptop = on_cpus()
    assert memory.on_host_bytes(changed(laptop, "generator", replicas=3)) - memory.on_host_bytes(laptop) == 2 * int(
        memory.generator_need(laptop).size_bytes
    )


def test_the_generator_may_use_vllms_share_of_the_smallest_gpu() -> None:
    host = on_gpus()
    assert isinstance(host.nvidia, Nvidia)
    assert "73.6 GiB on each GPU (0.92 × 80.0 GiB)" in memory.generator(host).message
    assert "of 80.0 GiB on each GPU" in memory.trainer(host).message
    mixed = replace(host.nvidia, gpus=(Gpu(0, UUIDS[0], 16 * GIB), *host.nvidia.gpus[1:]))
    mixed_host = replace(host, nvidia=mixed)
    assert memory.generator(mixed_host).status == "ok"
    larger = replace(mixed_host, model=replace(QWEN, parameters=16_000_000_000))
    assert memory.generator(larger).status == "fail", "14.9 GiB each, of 0.92 × 16"
    assert "tandem gpus" in memory.generator(larger).fix


def test_on_the_cpu_the_fix_is_a_smaller_cache() -> None:
    laptop = on_cpus()
    assert isinstance(laptop.model, Model)
    too_large = replace(laptop, model=replace(laptop.model, parameters=10_000_000_000))
    assert memory.generator(too_large).status == "fail"
    assert memory.KV_SPACE in memory.generator(too_large).fix
