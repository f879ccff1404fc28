"""How the generator uses vLLM's client: completions in parts, and the pause for a switch. vLLM's engine is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_protocol.messages import Completion, Prompt, RolloutRequest, Sampling, SwitchMode, VersionSpan
from tandem_protocol.version import Version

pytestmark = pytest.mark.vllm

TOKENS = ((5, 6, 7, 8, 9), (10, 11, 12))
"""Tokens of two completions. The logprob of token t is −t."""


class Client:
    """Reports the completions in parts of some tokens if it is asked for parts, else at their end."""

    def __init__(self, tokens_per_part: int) -> None:
        self.tokens_per_part = tokens_per_part
        self.intervals: list[int | None] = []

    async def generate(self, request: Any, params: Any, name: str, **_: Any) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        self.intervals.append(params.stream_interval)
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            yield SimpleNamespace(outputs=[_part(i, ids, 0, len(ids)) for i, ids in enumerate(TOKENS)], finished=True)
            return
        for start in range(0, 5, self.tokens_per_part):
            parts = [
                _part(index, ids, start, start + self.tokens_per_part)
                for index, ids in enumerate(TOKENS)
                if start < len(ids)
            ]
            yield SimpleNamespace(outputs=parts[::-1], finished=start + self.tokens_per_part >= 5)


def _part(index: int, ids: Sequence[int], start: int, end: int) -> Any:
    from vllm.logprobs import FlatLogprobs, Logprob
    from vllm.outputs import CompletionOutput

    flat = FlatLogprobs()
    for token in ids:
        flat.append({token: Logprob(-float(token), 1), 99: Logprob(-0.5, 2)})
    is_last = end >= len(ids)
    span = SimpleNamespace(version="3.1", start=0, end=len(ids))
    return CompletionOutput(
        index=index,
        text="",
        token_ids=list(ids[start:end]),
        cumulative_logprob=None,
        logprobs=flat[start:end],
        finish_reason="stop" if is_last else None,
        weight_versions=[span] if is_last else None,
    )


async def _sampled(client: Client, heartbeat_s: float | None) -> tuple[list[Completion], list[int]]:
    from tandem_generator.engines.vllm import VllmEngine

    engine = VllmEngine()
    engine._client, engine._takes_seeds, engine._adapter = client, True, None
    counted: list[int] = []
    request = RolloutRequest(
        prompts=(Prompt(token_ids=(1,)),), sampling=Sampling(n=2, max_tokens=5), heartbeat_s=heartbeat_s
    )
    (group,) = [group async for group in engine.generate(request, counted.append)]
    return list(group.completions), counted


@pytest.mark.parametrize("tokens_per_part", [1, 2, 3, 5])
def test_parts_make_the_same_completions(tokens_per_part: int) -> None:
    whole, _ = asyncio.run(_sampled(Client(tokens_per_part), None))
    parts, counted = asyncio.run(_sampled(Client(tokens_per_part), 1.0))
    assert parts == whole
    assert [c.token_ids for c in parts] == list(TOKENS)
    assert [c.logprobs for c in parts] == [tuple(-float(token) for token in ids) for ids in TOKENS]
    assert [c.versions for c in parts] == [(VersionSpan(version=Version(3, 1), tokens=len(ids)),) for ids in TOKENS]
    assert sum(counted) == 8


def test_only_a_request_with_heartbeats_costs_reports_of_parts() -> None:
    from tandem_generator.engines.vllm import TOKENS_PER_PART

    client = Client(2)
    asyncio.run(_sampled(client, None))
    asyncio.run(_sampled(client, 1.0))
    assert client.intervals == [None, TOKENS_PER_PART]


class Pausing:
    """The parts of vLLM's client that stop decoding. Notes their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.renderer = SimpleNamespace(clear_mm_cache_async=self._note("clear_mm_cache"))
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._note("pause_scheduler"))

    def _note(self, name: str) -> Callable[..., Any]:
        async def call(**options: Any) -> None:
            self.calls.append((name, options))

        return call


@pytest.mark.parametrize("mode", SwitchMode)
def test_a_pause_is_that_of_vllm_without_its_sleep(mode: SwitchMode, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from tandem_generator.engines.vllm import _PAUSE_MODES, VllmEngine

    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    theirs: Any = Pausing()
    asyncio.run(AsyncLLM.pause_generation(theirs, mode=_PAUSE_MODES[mode], clear_cache=True))
    assert slept == [0.02]
    engine = VllmEngine()
    engine._client = ours = Pausing()
    asyncio.run(engine.pause(mode))
    assert ours.calls == theirs.calls
    assert slept == [0.02], "ours does not sleep"
