"""The client that TRL's trainers get, without TRL: what it publishes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import trl
from support.generators import TOKEN, Generator, running
from support.rollouts import answer, completion
from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.trl import TrlSettings
from tandem_protocol.errors import TandemError, WeightsRefused
from tandem_protocol.messages import RolloutRequest
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer.trl.client import TandemClient, _writer


class Original:
    """Stands for TRL's client: only the signatures matter."""

    def __init__(self, base_url=None, host="0.0.0.0", server_port=8000, group_port=51216, connection_timeout=0.0): ...
    def generate(self, prompts, n=1, max_tokens=16, temperature=1.0, logprobs=0, generation_kwargs=None): ...
    def chat(self, messages, n=1, max_tokens=16, logprobs=0, tools=None, chat_template_kwargs=None): ...


class Trainer:
    """Stands for TRL's trainer, whose callbacks name it."""

    def __init__(self) -> None:
        self.callbacks = [self]


@pytest.fixture
def generator(tmp_path: Path, model: Path) -> Iterator[Generator]:
    with running("mock", model, tmp_path / "weights", log=tmp_path / "generator.log") as generator:
        yield generator


@pytest.fixture
def make_client(tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("TANDEM_TOKEN", raising=False)
    defaults = {"shared.model": "m", "shared.weights_dir": str(tmp_path / "weights")}
    settings, _ = load(TrlSettings, env={}, defaults=defaults)
    kind: Any = type("VLLMClient", (TandemClient,), {"original": Original, "settings": settings})
    clients = []

    def make(base_url: str = f"http://tandem:{TOKEN}@127.0.0.1:{generator.port}") -> TandemClient:
        clients.append(kind(base_url=base_url, connection_timeout=10))
        return clients[-1]

    yield make
    for client in clients:
        client.close_communicator()
    _writer.cache_clear()


@pytest.fixture
def weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def named(weights: dict[str, torch.Tensor]) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in weights.items()]


def publish_at_once(client: TandemClient, weights: dict[str, torch.Tensor]) -> None:
    client.update_named_params(named(weights), iter(weights.items()))


def publish_in_a_block(client: TandemClient, weights: dict[str, torch.Tensor]) -> None:
    with client.weight_update():
        for name, tensor in weights.items():
            client.update_named_param(name, tensor)


def publish_one_by_one(client: TandemClient, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        client.update_named_param(name, tensor)
    client.reset_prefix_cache()


@pytest.mark.parametrize("publish", [publish_at_once, publish_in_a_block, publish_one_by_one])
def test_each_way_to_send_weights_publishes_one_version(
    tmp_path: Path, generator: Generator, make_client: Any, weights: Any, publish: Any
):
    client = make_client()
    client.init_communicator()
    for step in range(2):
        publish(client, weights)
        client.reset_prefix_cache()
        assert generator.served.version == Version(step, 1)
    version, published = trl.newest(tmp_path / "weights")
    assert version == "1.1"
    assert same(published, weights)


def test_a_copy_is_published_because_trl_takes_a_merged_adapter_out_again(
    tmp_path: Path, make_client: Any, weights: Any
):
    client = make_client()
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        client.update_named_param(name, tensor)
        tensor.zero_()
    client.reset_prefix_cache()
    assert same(trl.newest(tmp_path / "weights")[1], kept)


def test_an_update_that_fails_publishes_nothing(tmp_path: Path, make_client: Any):
    client = make_client()
    client.init_communicator()

    def fail() -> None:
        with client.weight_update():
            client.update_named_param("lm_head.weight", torch.ones(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    client.reset_prefix_cache()
    assert WeightStore(tmp_path / "weights").versions() == []


def test_a_part_of_the_model_is_refused(make_client: Any, weights: Any):
    client = make_client()
    weights.popitem()
    with pytest.raises(WeightsRefused, match="belongs to another model"):
        publish_at_once(client, weights)


def test_a_model_that_the_script_has_changed_is_refused_with_what_the_script_must_do(make_client: Any, model: Path):
    trained = AutoModelForCausalLM.from_pretrained(model)
    trained.resize_token_embeddings(70)
    with pytest.raises(WeightsRefused, match=r"trainer \(70, 32\), generator \(64, 32\).*have the script load that"):
        make_client().update_model_params(trained)


def test_the_version_carries_the_trainers_step_and_a_new_attempt(generator: Generator, make_client: Any, weights: Any):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=7))
    first = make_client()
    first._trainer = lambda: trainer
    publish_at_once(first, weights)
    publish_at_once(first, weights)
    assert generator.served.version == Version(8, 1), "twice in a step"
    second = make_client()
    publish_at_once(second, weights)
    assert generator.served.version == Version(0, 2)


def test_completions_are_those_of_the_newest_weights(generator: Generator, make_client: Any, weights: Any):
    client = make_client()
    prompts = [[5, 9, 13], [7, 7]]
    before = client.generate(prompts, n=2, max_tokens=5, temperature=0.0)
    assert (before["prompt_ids"], len(before["completion_ids"])) == (prompts, 4)
    publish_at_once(client, weights)
    publish_at_once(client, weights)
    assert client.generate(prompts, n=2, max_tokens=5, temperature=0.0)["completion_ids"] != before["completion_ids"]


def test_every_request_names_the_version_that_was_published_last(
    make_client: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
):
    client = make_client()
    asked = []

    async def rollouts(request: RolloutRequest, take: Any, **_: Any) -> None:
        asked.append(request.min_version)
        take(answer([completion([5])]))

    monkeypatch.setattr(client._client, "rollouts", rollouts)
    client.generate([[5]])
    publish_at_once(client, weights)
    client.generate([[5]])
    for name, tensor in weights.items():
        client.update_named_param(name, tensor)
    client.generate([[5]])
    assert asked == [None, Version(0, 1), Version(1, 1)], "parameters that nobody published yet are published first"


def test_text_and_conversations_are_tokenized_as_the_trainer_does(model: Path, make_client: Any):
    tokenizer = AutoTokenizer.from_pretrained(model)
    client = make_client()
    with pytest.raises(ConfigError, match="got text without a trainer"):
        client.generate(["1+1="])
    trainer = SimpleNamespace(processing_class=tokenizer, state=SimpleNamespace(global_step=0))
    client._trainer = lambda: trainer
    assert client.generate(["1+1="], max_tokens=1)["prompt_ids"] == [
        tokenizer("1+1=", add_special_tokens=False).input_ids
    ]
    conversation = [{"role": "user", "content": "1+1"}]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert client.chat([conversation], max_tokens=1)["prompt_ids"] == [rendered]
    picture = [[{"role": "user", "content": [{"type": "image", "image": None}]}]]
    with pytest.raises(ConfigError, match="images"):
        client.chat(picture)


def test_a_stop_string_ends_completions_at_the_token_that_completes_it(model: Path, make_client: Any):
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = SimpleNamespace(processing_class=tokenizer, state=SimpleNamespace(global_step=0))
    client = make_client()
    client._trainer = lambda: trainer
    options: dict[str, Any] = {"n": 4, "max_tokens": 30, "generation_kwargs": {"ignore_eos": True, "seed": 3}}
    prompts = [[5, 9, 13], [7, 7]]
    complete = client.generate(prompts, **options)
    stop = tokenizer.decode(complete["completion_ids"][5][10:12])
    options["generation_kwargs"]["stop"] = stop
    cut = client.generate(prompts, **options)
    assert len(cut["completion_ids"][5]) <= 12
    for all_ids, ids, logprobs in zip(complete["completion_ids"], cut["completion_ids"], cut["logprobs"], strict=True):
        assert (all_ids[: len(ids)], len(logprobs)) == (ids, len(ids))
        text = tokenizer.decode(all_ids)
        assert tokenizer.decode(ids) == (text[: text.index(stop) + len(stop)] if stop in text else text)


def test_a_generator_with_a_larger_vocabulary_is_named_before_torch_fails_on_its_tokens(model: Path, make_client: Any):
    trained = AutoModelForCausalLM.from_pretrained(model)
    trained.resize_token_embeddings(8)
    trainer = SimpleNamespace(model=trained, state=SimpleNamespace(global_step=0))
    client = make_client()
    client._trainer = lambda: trainer
    with pytest.raises(ConfigError, match=rf"a generator with the model '{model}', expected ids below 8"):
        client.generate([[5, 6]] * 4, n=4, max_tokens=20)


def test_a_request_that_the_generator_refuses_says_why(make_client: Any):
    with pytest.raises(TandemError, match="got token id 99, expected ids below the vocabulary's size 64"):
        make_client().generate([[99]])


def test_a_wrong_token_is_reported_at_once(generator: Generator, make_client: Any):
    with pytest.raises(TandemError, match="got another token"):
        make_client(f"http://tandem:wrong@127.0.0.1:{generator.port}")


def test_an_update_of_a_whole_model_publishes_it(tmp_path: Path, model: Path, make_client: Any):
    trained = AutoModelForCausalLM.from_pretrained(model)
    make_client().update_model_params(trained)
    assert same(trl.newest(tmp_path / "weights")[1], load_file(model / "model.safetensors"))


def test_no_thread_is_left_after_the_end(make_client: Any):
    before = set(threading.enumerate())
    client = make_client()
    assert set(threading.enumerate()) - before
    client.close_communicator()
    client.close_communicator()
    assert set(threading.enumerate()) - before == set()


def test_no_thread_is_left_when_its_trainer_is_gone(make_client: Any, monkeypatch: pytest.MonkeyPatch):
    before = set(threading.enumerate())
    trainer = Trainer()
    monkeypatch.setattr(TandemClient, "trainer", weakref.ref(trainer))
    make_client()
    assert set(threading.enumerate()) - before
    del trainer
    gc.collect()
    assert set(threading.enumerate()) - before == set()


def test_torch_names_its_devices_as_before_after_the_start(make_client: Any):
    named = torch.accelerator.current_accelerator, torch.cuda.current_device
    client = make_client()
    assert torch.accelerator.current_accelerator() is not None, "Online DPO asks before init_communicator"
    client.init_communicator()
    assert (torch.accelerator.current_accelerator, torch.cuda.current_device) == named
