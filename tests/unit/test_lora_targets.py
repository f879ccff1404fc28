"""An adapter that the generator could not serve is refused at the start, or before it reaches the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from support.engines import ScriptedEngine, Start, WatchedStore, put
from support.weights import FINGERPRINT
from tandem_protocol.config.learning import LoraConfig
from tandem_protocol.errors import SwitchFailed, WeightsRefused
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME
from tandem_protocol.messages import Info
from tandem_protocol.version import BASE, Version
from tandem_rollout.errors import UserError
from tandem_rollout.handshake import check_generators
from tandem_trainer.learner.lora import adapted_head, adapter_table, add_adapter

COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
GATED = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, **COMMON}
LLAMA, TIED = LlamaConfig(**GATED), LlamaConfig(tie_word_embeddings=True, **GATED)
MAMBA = MambaConfig(state_size=4, **COMMON)
MOE = MixtralConfig(num_local_experts=2, **GATED)


def _adapted(config: PreTrainedConfig, *targets: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config)
    chosen = {"target_modules": targets} if targets else {}
    add_adapter(model, LoraConfig.model_validate({"r": 2} | chosen), "base")
    return model


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LLAMA, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (TIED, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (Phi3Config(pad_token_id=0, **GATED), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2), {"c_attn", "c_proj", "c_fc"}),
        (
            GPTNeoXConfig(intermediate_size=64, num_attention_heads=2, **COMMON),
            {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_all_linear_means_every_linear_layer_except_the_output_embedding(config: PreTrainedConfig, layers: set[str]):
    names = list(adapter_table(_adapted(config), torch.float32))
    matches = [re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name) for name in names]
    assert {match[1].rpartition(".")[2] for match in matches if match} == layers
    assert all(matches)


@pytest.mark.parametrize(
    ("config", "targets", "words"),
    [
        (LLAMA, ["embed_tokens"], r"includes model\.embed_tokens \(Embedding\), expected linear layers only"),
        (
            LLAMA,
            ["q_proj", "embed_tokens"],
            r"embed_tokens \(Embedding\).*name layers from this list: down_proj, gate_proj, k_proj",
        ),
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2), ["wte", "wpe"], r"transformer\.wte \(Embedding\)"),
        (TIED, ["lm_head", "q_proj"], "includes lm_head, which shares its weights with the input embeddings"),
        (MAMBA, ["conv1d"], "conv1d.*name layers from this list: dt_proj, in_proj, out_proj, x_proj"),
        (MOE, [], r"experts \(MixtralExperts\).*name layers from this list: k_proj, o_proj, q_proj, v_proj"),
        (LLAMA, ["q_proj", "no_such"], "names no_such, which LlamaForCausalLM does not have"),
        (LLAMA, ["no_such"], "no_such.*name layers from this list: down_proj"),
        (LLAMA, ["input_layernorm"], "input_layernorm|LlamaRMSNorm"),
        (LLAMA, ["proj"], "proj.*name layers from this list:"),
    ],
)
def test_target_that_cannot_be_served_is_refused_by_name_at_the_start(
    config: PreTrainedConfig, targets: list[str], words: str
):
    with pytest.raises(UserError, match=words) as error:
        _adapted(config, *targets)
    assert str(error.value).startswith("trainer.lora.target_modules")


def test_the_linear_layers_of_a_mixture_of_experts_and_of_a_state_space_model_are_adapted():
    assert _adapted(MOE, "q_proj", "o_proj").peft_config
    assert _adapted(MAMBA, "in_proj", "x_proj").peft_config


def test_untied_output_embedding_can_be_adapted():
    assert adapted_head(_adapted(LLAMA, "lm_head", "q_proj")) == "lm_head"
    assert adapted_head(_adapted(LLAMA, "q_proj")) is None
    assert adapted_head(AutoModelForCausalLM.from_config(LLAMA)) is None


# -- the handshake ---------------------------------------------------------------------------------------------------

INFO = Info(
    generator_id="g",
    engine="vllm",
    engine_version="1",
    model="m",
    fingerprint=FINGERPRINT,
    version=BASE,
    devices=("cpu:0",),
    world_size=1,
    max_model_len=32,
    max_num_seqs=1,
    kinds=("lora",),
    max_lora_rank=8,
    lora_heads=(),
)


def _handshake(info: Info, lora: LoraConfig | None, head: str | None = None) -> int:
    return check_generators(
        [info],
        ["http://a"],
        ours=FINGERPRINT,
        model="m",
        max_completion_length=16,
        accelerators=(),
        lora=lora,
        adapted_head=head,
    )


@pytest.mark.parametrize(
    ("changes", "r", "head", "words"),
    [
        ({"kinds": ("full",)}, 6, None, r"kind full, but this run publishes lora.*enable_lora: true, max_lora_rank: 8"),
        ({}, None, None, r"kind lora, but this run publishes full.*set trainer\.lora"),
        ({}, 16, None, r"up to rank 8, but trainer\.lora\.r is 16"),
        ({}, 8, "lm_head", "does not support an adapter for the output embedding lm_head"),
    ],
)
def test_generator_that_cannot_serve_the_adapter_is_named_at_the_start(
    changes: dict[str, Any], r: int | None, head: str | None, words: str
):
    with pytest.raises(UserError, match=words):
        _handshake(INFO.model_copy(update=changes), LoraConfig(r=r) if r else None, head)


def test_generator_that_serves_the_adapter_is_accepted():
    assert _handshake(INFO, LoraConfig(r=8)) == 32
    assert _handshake(INFO.model_copy(update={"lora_heads": ("lm_head",)}), LoraConfig(r=8), "lm_head") == 32
    assert _handshake(INFO.model_copy(update={"kinds": ("full", "lora"), "max_lora_rank": None}), LoraConfig(r=99))


# -- the generator refuses before it pauses its engine ---------------------------------------------------------------

V1 = Version(1, 1)
LAYERS = {"model.layers.0.q_proj.weight": (6, 4), "lm_head.weight": (8, 4), "model.embed_tokens.weight": (8, 4)}
PREFIX = "base_model.model."


def _publish(store: WatchedStore, tensors: Mapping[str, tuple[int, ...]], version: Version = V1) -> str:
    (store.root / "versions").mkdir(parents=True, exist_ok=True)
    with store.staging(version, needs_bytes=1 << 12) as staged:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
        save_file(arrays, staged / "adapter_model.safetensors")
        (staged / ADAPTER_CONFIG_NAME).write_text('{"r": 2}')
        return store.commit(staged, version, run="test", fingerprint=FINGERPRINT, kind="lora")[1]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"model.embed_tokens.lora_embedding_A.default": (2, 8)},
            "lora_embedding_A.default is not a matrix",
        ),
        ({"model.embed_tokens.lora_embedding_A": (2, 8)}, "lora_embedding_A is not a matrix of a linear layer"),
        ({"model.layers.0.q_proj.lora_magnitude_vector": (6,)}, "lora_magnitude_vector is not a matrix"),
        ({"model.layers.0.q_proj.weight": (6, 4)}, "q_proj.weight is not a matrix"),
        ({"model.layers.7.q_proj.lora_A.weight": (2, 4)}, "the model has no linear layer model.layers.7.q_proj"),
        ({"model.layers.0.q_proj.lora_A.weight": (2, 5)}, "has the shape (2, 5) for a layer of (6, 4)"),
        ({"model.layers.0.q_proj.lora_B.weight": (7, 2)}, "has the shape (7, 2) for a layer of (6, 4)"),
        ({"lm_head.lora_A.weight": (2, 4)}, "the output embedding lm_head takes no adapter"),
    ],
)
async def test_adapter_with_a_tensor_that_is_not_served_is_refused_permanently(
    start: Start, engine: ScriptedEngine, store: WatchedStore, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    engine.facts = engine.facts._replace(
        kinds=frozenset({"lora"}), max_lora_rank=8, layers=LAYERS, lora_heads=("other_head",)
    )
    policy = await start()
    with pytest.raises(WeightsRefused, match=re.escape(words)) as error:
        await put(policy, V1, _publish(store, {PREFIX + name: shape for name, shape in tensors.items()}))
    assert not error.value.retryable
    assert engine.calls == ["start"]


async def test_an_adapter_of_the_model_s_layers_is_loaded(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(
        kinds=frozenset({"lora"}), max_lora_rank=8, layers=LAYERS, lora_heads=("lm_head",)
    )
    policy = await start()
    shapes = {"lm_head.lora_A.weight": (2, 4), "lm_head.lora_B.weight": (8, 2)}
    digest = _publish(store, {PREFIX + name: shape for name, shape in shapes.items()})
    assert (await put(policy, V1, digest)).version == V1


async def test_version_that_repeatedly_fails_to_load_is_refused_permanently(
    start: Start, engine: ScriptedEngine, store: WatchedStore
) -> None:
    engine.facts = engine.facts._replace(kinds=frozenset({"lora"}), max_lora_rank=8)
    policy, digest = await start(), _publish(store, {"layer.lora_A.weight": (2, 4)})
    other = _publish(store, {"layer.lora_A.weight": (2, 4)}, Version(2, 1))
    bad = RuntimeError("unexpected layer")
    for expected in (SwitchFailed, SwitchFailed, WeightsRefused):
        engine.failures = [bad]
        with pytest.raises(expected, match=r"1\.1 failed half-way \(unexpected layer\)") as error:
            await put(policy, V1, digest)
    assert "will not be tried again" in str(error.value)
    assert policy.not_ready is None
    assert policy.version == BASE
    engine.failures = [bad]
    with pytest.raises(SwitchFailed):
        await put(policy, Version(2, 1), other)
    assert (await put(policy, Version(2, 1), other)).version == Version(2, 1)
