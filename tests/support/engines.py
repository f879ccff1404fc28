"""A scripted engine and store, to test a WeightSwitcher without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from support.weights import FINGERPRINT, tensors
from tandem_generator.engines.base import EngineFacts, OnTokens, no_count
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import (
    Completion,
    Group,
    Prompt,
    RolloutRequest,
    Sampling,
    ServedWeights,
    SetWeights,
    SwitchMode,
    VersionSpan,
)
from tandem_protocol.store import WeightStore
from tandem_protocol.version import BASE, Version

Start = Callable[..., Coroutine[Any, Any, WeightSwitcher]]
"""Takes settings of GeneratorConfig, and returns a started switcher."""

FACTS = EngineFacts(
    engine="scripted",
    engine_version="1",
    devices=("cpu:0",),
    world_size=1,
    max_model_len=32,
    max_num_seqs=8,
    vocab_size=100,
    base_shards=(Path("base.safetensors"),),
    shapes={name: tensor.shape for name, tensor in tensors(0).items()},
    fingerprint=FINGERPRINT,
)


class ScriptedEngine:
    """Engine that records its calls. Tests control whether its methods succeed, fail or wait."""

    facts = FACTS

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.holds = BASE
        self.failures: list[Exception | None] = []
        """Exceptions that the next loads raise, in order. None: the load succeeds."""
        self.may_pause = asyncio.Event()
        self.may_load = asyncio.Event()
        self.computes = asyncio.Event()
        for gate in (self.may_pause, self.may_load, self.computes):
            gate.set()
        self.checked = asyncio.Event()
        self.computed = asyncio.Event()
        self.at_resume: Callable[[], object] = lambda: None

    async def start(self) -> None:
        self.calls.append("start")

    async def generate(self, request: RolloutRequest, on_tokens: OnTokens = no_count) -> AsyncGenerator[Group, None]:
        span = VersionSpan(version=self.holds, tokens=1)
        for index in range(len(request.prompts)):
            completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="length", versions=(span,))
            yield Group(prompt_index=index, completions=(completion,) * request.sampling.n)

    async def pause(self, mode: SwitchMode) -> None:
        self.calls.append(f"pause {mode}")
        await self.may_pause.wait()

    async def load_weights(self, version: Version, files: Sequence[Path]) -> None:
        self.calls.append(f"load {version}")
        await self.may_load.wait()
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        assert files
        self.holds = version

    async def resume(self) -> None:
        self.calls.append("resume")
        self.at_resume()

    async def check(self) -> None:
        self.checked.set()
        await self.computes.wait()
        self.computed.set()

    async def close(self) -> None:
        self.calls.append("close")


class WatchedStore(WeightStore):
    """Store that records verifications in the engine's list of calls, and signals when a version was looked up."""

    def __init__(self, root: Path, calls: list[str]) -> None:
        super().__init__(root)
        self.calls = calls
        self.looked = asyncio.Event()
        self.at_verify: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()

    def read(self, version: Version) -> tuple[Manifest, str]:
        try:
            return super().read(version)
        finally:
            self._loop.call_soon_threadsafe(self.looked.set)

    def verify(self, manifest: Manifest) -> None:
        self.calls.append(f"verify {manifest.version}")
        self.at_verify()
        super().verify(manifest)


async def put(
    switcher: WeightSwitcher, version: Version, digest: str, mode: SwitchMode = SwitchMode.DRAIN
) -> ServedWeights:
    return await switcher.set(version, SetWeights(manifest_digest=digest, mode=mode))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the switcher has no events for these conditions
            await asyncio.sleep(0.001)


def request(*token_ids: int, max_tokens: int = 1, min_version: Version | None = None) -> RolloutRequest:
    return RolloutRequest(
        prompts=(Prompt(token_ids=token_ids or (1,)),),
        sampling=Sampling(max_tokens=max_tokens),
        min_version=min_version,
    )


async def version_that_answers(switcher: WeightSwitcher) -> Version:
    (group,) = [group async for group in switcher.rollouts(request())]
    return group.completions[0].versions[0].version
