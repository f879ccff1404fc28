"""The mock engine: a deterministic policy with exact logprobs, to test a trainer without torch, vLLM or a model.

The policy is a real conditional distribution. A hash of the version's step and all previous tokens selects eight tokens
of the vocabulary, and these get the probabilities of `_WEIGHTS`. One of them ends the sequence. So:

- Anyone can recompute a logprob, with `MockPolicy.distribution`.
- Every step is another policy.
- The same seed, prompt and step give the same completion, on every machine and in every attempt of the trainer.

A script (`script.py`) can say which tokens are sampled. A scripted token takes the place of the candidate that the mock
would have sampled, and has its logprob. So logprobs differ from token to token, and filters apply to them.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from array import array
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Literal

import xxhash

from tandem_protocol.config.generator import MockConfig
from tandem_protocol.errors import EngineFailed
from tandem_protocol.fingerprint import checkpoint_shapes, fingerprint
from tandem_protocol.manifest import ADAPTER_CONFIG_NAME, read_header
from tandem_protocol.messages import (
    Completion,
    Group,
    ModelFingerprint,
    Prompt,
    RolloutRequest,
    Sampling,
    SwitchMode,
    VersionSpan,
)
from tandem_protocol.version import BASE, Version

from .base import EngineFacts, OnTokens, no_count
from .script import Script, read_script
from .script_tokens import ScriptTokens

_WEIGHTS = tuple(0.5**rank for rank in range(8))
_EOS_RANK = 3
"""Index of the candidate that ends the sequence. At temperature 1, completions have about 16 tokens on average."""
_DEFAULT_VOCAB_SIZE = 256
_DEFAULT_MAX_MODEL_LEN = 4096
_MAX_LORA_RANK = 512


class ConnectionDropped(Exception):
    """Breaks the HTTP connection in the middle of an answer. Raised by the fault `drop_rate`."""


class MockPolicy:
    """The mock's distribution of the next token."""

    def __init__(self, vocab_size: int, eos_token_id: int) -> None:
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id

    def context(self, tokens: Sequence[int]) -> xxhash.xxh3_64:
        """Return the hash of a token sequence. `extend` adds further tokens."""
        return xxhash.xxh3_64(array("q", tokens).tobytes())

    @staticmethod
    def extend(context: xxhash.xxh3_64, token: int) -> None:
        """Add one token to a hash."""
        context.update(token.to_bytes(8, "little"))

    def distribution(
        self, context: xxhash.xxh3_64, version: Version, sampling: Sampling
    ) -> tuple[list[int], list[float]]:
        """Return the candidate tokens, most likely first, and their probabilities after temperature and filters."""
        start = xxhash.xxh3_64_intdigest(f"{context.intdigest()} {version.step}".encode())
        stride = (start >> 32) % max(1, self.vocab_size // len(_WEIGHTS)) + 1
        tokens = [(start + rank * stride) % self.vocab_size for rank in range(min(len(_WEIGHTS), self.vocab_size))]
        if self.eos_token_id not in tokens and len(tokens) > _EOS_RANK:
            tokens[_EOS_RANK] = self.eos_token_id
        return tokens, _filtered(len(tokens), sampling)


def _filtered(count: int, sampling: Sampling) -> list[float]:
    """Return the probabilities of the first `count` candidates. Those that a filter drops have 0."""
    if sampling.temperature == 0.0:
        return [1.0] + [0.0] * (count - 1)
    weights = [weight ** (1.0 / sampling.temperature) for weight in _WEIGHTS[:count]]
    total = sum(weights)
    before = 0.0
    for rank, weight in enumerate(weights):
        beyond_k = bool(sampling.top_k) and rank >= sampling.top_k
        if rank and (beyond_k or before >= sampling.top_p * total or weight < sampling.min_p * weights[0]):
            weights[rank] = 0.0
        before += weight
    kept = sum(weights)
    return [weight / kept for weight in weights]


class MockEngine:
    """Engine that samples from `MockPolicy` and can inject faults.

    Args:
        model: Directory of a model. Its configuration and parameter table are used if it exists.
        config: Settings of the mock.
        max_model_len: Maximum length of prompt and completion together, in tokens. None: the model's.

    Raises:
        ConfigError: The script cannot be used.
    """

    def __init__(self, model: str, config: MockConfig, max_model_len: int | None) -> None:
        directory = Path(model) if Path(model).is_dir() else None
        described = _read_config(directory)
        vocab_size = config.vocab_size or described.get("vocab_size", _DEFAULT_VOCAB_SIZE)
        eos = described.get("eos_token_id", 0)
        self._policy = MockPolicy(vocab_size, eos[0] if isinstance(eos, list) else eos or 0)
        self._script: Script | None = None
        if config.script is not None:
            tokens = ScriptTokens(directory, vocab_size, self._policy.eos_token_id)
            self._script = Script(read_script(config.script), tokens)
        self._faults = config.faults
        self._chance = random.Random(0)  # noqa: S311 - decides when a fault happens, not a secret
        self._loads_to_fail = config.faults.load_failures
        self._version = self._label = BASE
        self._admit = asyncio.Event()
        self._run = asyncio.Event()
        self._idle = asyncio.Event()
        for gate in (self._admit, self._run, self._idle):
            gate.set()
        self._running = 0
        self._abort_epoch = 0
        shapes = checkpoint_shapes(directory) if directory else {}
        self.facts = EngineFacts(
            engine="mock",
            engine_version="1",
            devices=tuple(f"cpu:{core}" for core in sorted(os.sched_getaffinity(0))),
            world_size=1,
            max_model_len=max_model_len or described.get("max_position_embeddings", _DEFAULT_MAX_MODEL_LEN),
            max_num_seqs=256,
            vocab_size=vocab_size,
            base_shards=(),
            shapes=shapes or None,
            layers=shapes,
            fingerprint=fingerprint(directory, shapes) if directory else ModelFingerprint(),
            kinds=frozenset({"full", "lora"}),
            max_lora_rank=_MAX_LORA_RANK,
        )

    async def start(self) -> None:
        """Do nothing: there is nothing to load."""

    async def generate(self, request: RolloutRequest, on_tokens: OnTokens = no_count) -> AsyncGenerator[Group, None]:
        await self._admit.wait()
        self._running += 1
        self._idle.clear()
        fault = self._fault()
        is_instant = not (self._faults.latency_s or self._faults.token_latency_s)
        # Without a latency nothing waits, so one group after the other: other tasks run in between.
        turn = asyncio.Semaphore(1 if is_instant else len(request.prompts))
        decoding = [
            asyncio.create_task(self._group(index, prompt, request.sampling, self._abort_epoch, on_tokens, turn))
            for index, prompt in enumerate(request.prompts)
        ]
        try:
            finished = asyncio.as_completed(decoding)
            for count in range(len(decoding)):
                if fault and count == len(decoding) // 2:
                    raise fault
                yield await next(finished)
        finally:
            for task in decoding:
                task.add_done_callback(_ignore)
                task.cancel()
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _group(
        self,
        index: int,
        prompt: Prompt,
        sampling: Sampling,
        epoch: int,
        on_tokens: OnTokens,
        turn: asyncio.Semaphore,
    ) -> Group:
        async with turn:
            for _ in range(index + 1 if self._faults.latency_s else 1):
                if epoch == self._abort_epoch:
                    await asyncio.sleep(self._faults.latency_s)
            await self._run.wait()
            samples = (self._sample(prompt, sample, sampling, epoch, on_tokens) for sample in range(sampling.n))
            return Group(prompt_index=index, completions=tuple(await asyncio.gather(*samples)))

    async def _sample(
        self, prompt: Prompt, sample: int, sampling: Sampling, epoch: int, on_tokens: OnTokens
    ) -> Completion:
        seed = random.getrandbits(64) if prompt.seed is None else prompt.seed + sample
        scripted = self._script.answer(prompt.token_ids, (prompt.seed or 0) + sample) if self._script else ()
        context = self._policy.context(prompt.token_ids)
        draw = random.Random(f"{seed} {context.intdigest()}").random  # noqa: S311 - repeatable on purpose
        ends = self._script.ends if scripted and self._script else {self._policy.eos_token_id}
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)}
        tokens: list[int] = []
        logprobs: list[float] = []
        labels: list[Version] = []
        finish: Literal["stop", "length", "abort"] = "length"
        while len(tokens) < sampling.max_tokens:
            if self._faults.token_latency_s:
                await asyncio.sleep(self._faults.token_latency_s)
                await self._run.wait()
            if self._abort_epoch != epoch:
                finish = "abort"
                break
            candidates, probabilities = self._policy.distribution(context, self._version, sampling)
            rank = _choose(probabilities, draw())
            tokens.append(scripted[len(tokens)] if len(tokens) < len(scripted) else candidates[rank])
            logprobs.append(math.log(probabilities[rank]))
            labels.append(self._label)
            on_tokens(1)
            if tokens[-1] in stops:
                finish = "stop"
                break
            self._policy.extend(context, tokens[-1])
        return Completion(
            token_ids=tuple(tokens), logprobs=tuple(logprobs), finish_reason=finish, versions=_spans(labels)
        )

    def _fault(self) -> Exception | None:
        """Choose the fault of a request. None for no fault."""
        if self._chance.random() < self._faults.error_rate:
            return EngineFailed("the mock engine failed because of generator.mock.faults.error_rate. Fix: try again.")
        return ConnectionDropped() if self._chance.random() < self._faults.drop_rate else None

    async def pause(self, mode: SwitchMode) -> None:
        self._admit.clear()
        if mode is SwitchMode.IN_FLIGHT:
            self._run.clear()
            return
        if mode is SwitchMode.ABORT:
            self._abort_epoch += 1
        await self._idle.wait()

    async def load_weights(self, version: Version, files: Sequence[Path]) -> None:
        if self._loads_to_fail:
            self._loads_to_fail -= 1
            raise RuntimeError("the mock engine failed a load because of generator.mock.faults.load_failures")
        for file in files:
            if file.name != ADAPTER_CONFIG_NAME:
                await asyncio.to_thread(read_header, file)
        self._version = version
        if not self._faults.stale or self._label == BASE:
            self._label = version

    async def resume(self) -> None:
        self._run.set()
        self._admit.set()

    async def check(self) -> None:
        """Do nothing: the mock cannot hang."""

    async def close(self) -> None:
        """Do nothing: there is nothing to stop."""


def _ignore(task: asyncio.Task[Group]) -> None:
    """Note the error of a group whose request has already ended, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()


def _choose(probabilities: Sequence[float], draw: float) -> int:
    for rank, probability in enumerate(probabilities):
        draw -= probability
        if draw < 0.0 and probability:
            return rank
    return max(rank for rank, probability in enumerate(probabilities) if probability)


def _spans(labels: Sequence[Version]) -> tuple[VersionSpan, ...]:
    spans: list[VersionSpan] = []
    for label in labels:
        if spans and spans[-1].version == label:
            spans[-1] = VersionSpan(version=label, tokens=spans[-1].tokens + 1)
        else:
            spans.append(VersionSpan(version=label, tokens=1))
    return tuple(spans)


def _read_config(directory: Path | None) -> dict[str, int]:
    path = directory / "config.json" if directory else None
    return json.loads(path.read_text()) if path and path.is_file() else {}
