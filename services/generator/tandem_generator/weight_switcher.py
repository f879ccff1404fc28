"""Which policy version serves: verify, pause, load, flip, resume; roll back if loading fails half-way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NamedTuple

from tandem_protocol.errors import (
    BadRequest,
    NotReady,
    OlderVersion,
    PolicyTorn,
    StalePolicy,
    SwitchFailed,
    SwitchInProgress,
    TandemError,
    WeightsNotVisible,
    WeightsRefused,
)
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import Group, Kind, RolloutRequest, ServedWeights, SetWeights, SwitchMode, SwitchTimings
from tandem_protocol.store import WeightStore
from tandem_protocol.version import BASE, Version

from . import metrics
from .compatibility import check_model
from .config import GeneratorConfig
from .engines.base import Engine
from .lease import LeaseKeeper

log = logging.getLogger(__name__)

_SILENCES = 3
"""So many canaries in a row without a token, and the process restarts."""
_LOADS = 3
"""How often a version may fail to load before it is refused for good."""


class _Serving(NamedTuple):
    """A policy that is, or was, loaded whole."""

    version: Version
    manifest_digest: str | None
    files: tuple[Path, ...]
    kind: Kind = "full"


class WeightSwitcher:
    """The engine's policy: the one place that decides which weights it holds and whether it may answer.

    `set` is the only consumer of the engine's pause/load/resume; a second caller is refused, not queued.
    `rollouts` may run at any time. `failed` is set when the process must restart; the server waits for it.
    """

    def __init__(self, engine: Engine, store: WeightStore, config: GeneratorConfig) -> None:
        self.engine = engine
        self.generator_id = config.replica
        self.failed = asyncio.Event()
        self.stopping = False
        self._store = store
        self._config = config
        self._serving = _Serving(BASE, None, ())
        self._not_whole: str | None = "the engine is starting"
        self._hung: str | None = None
        self._lease = LeaseKeeper(store, self.generator_id)
        self._switching = asyncio.Lock()
        self._failed_loads: Counter[tuple[Version, str | None]] = Counter()
        self._finished_groups = 0
        self._tasks: list[asyncio.Task[None]] = []
        metrics.READY.set_function(lambda: self.not_ready is None)

    @property
    def version(self) -> Version:
        return self._serving.version

    @property
    def served(self) -> ServedWeights:
        return ServedWeights(version=self.version, manifest_digest=self._serving.manifest_digest)

    @property
    def not_ready(self) -> str | None:
        """Why no request is answered; None when ready."""
        return "it is stopping" if self.stopping else self._not_whole or self._hung

    async def start(self) -> None:
        """Start the engine and catch up with the store, so that base weights never serve in the middle of a run.

        Raises:
            TandemError: the store's newest version cannot be served.
        """
        await self.engine.start()
        self._serving = _Serving(BASE, None, self.engine.facts.base_shards)
        await self._catch_up()
        self._not_whole = None
        self._tasks = [asyncio.create_task(self._lease.keep()), asyncio.create_task(self._watch())]

    def stop(self) -> None:
        """The server is about to end: answer no further request and wait for no version. What runs may finish."""
        self.stopping = True

    async def close(self) -> None:
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._lease.hold()
        await self.engine.close()

    async def _catch_up(self) -> None:
        """Serve LATEST; the newest older version that is whole if LATEST is damaged; base weights in an empty store.

        Falling back trains on nothing wrong: a trainer asks for its own `min_version`.
        """
        problems: list[TandemError] = []
        tried: set[Version] = set()
        while (version := await asyncio.to_thread(self._newest_but, tried)) is not None:
            tried.add(version)
            try:
                _, digest = await self._visible(version)
                await self.set(version, SetWeights(manifest_digest=digest, mode=SwitchMode.ABORT))
                return
            except (WeightsNotVisible, WeightsRefused, SwitchFailed) as error:
                log.error("cannot start with version %s: %s", version, error)
                problems.append(error)
        if problems:
            raise WeightsRefused(
                f"none of the {len(problems)} versions in {self._store.root} can be served; the newest: {problems[0]} "
                "If the store is another model's or run's, set shared.weights_dir to a folder of this run's own; if "
                f"its files are damaged, delete {self._store.root}: a resumed trainer publishes again."
            )

    def _newest_but(self, tried: set[Version]) -> Version | None:
        latest = self._store.latest()
        candidates = [*reversed(self._store.versions()), *([latest] if latest else [])]
        untried = [version for version in candidates if version not in tried]
        return latest if latest in untried else next(iter(untried), None)

    def rollouts(self, request: RolloutRequest) -> AsyncGenerator[Group, None]:
        """Stream the groups of `request`, each when it is finished; the stream may raise EngineFailed.

        Raises:
            NotReady, StalePolicy, BadRequest: at once, before anything is sampled.
        """
        self._admit(request)
        return self._stream(request)

    async def _stream(self, request: RolloutRequest) -> AsyncGenerator[Group, None]:
        metrics.REQUESTS_RUNNING.inc()
        try:
            async with contextlib.aclosing(self.engine.generate(request)) as groups:
                async for group in groups:
                    self._finished_groups += 1
                    metrics.ROLLOUT_COMPLETIONS.inc(len(group.completions))
                    metrics.ROLLOUT_TOKENS.inc(sum(len(completion.token_ids) for completion in group.completions))
                    yield group
        finally:
            metrics.REQUESTS_RUNNING.dec()

    def _admit(self, request: RolloutRequest) -> None:
        if self.not_ready:
            raise NotReady(f"this generator is not ready: {self.not_ready}. Ask again, or another replica.")
        if request.min_version and self.version < request.min_version:
            raise StalePolicy(
                f"got min_version {request.min_version}; this generator serves {self.version}. Publish the version "
                f"with PUT /weights/{request.min_version}, or ask again when it has been."
            )
        facts = self.engine.facts
        longest = max(len(prompt.token_ids) for prompt in request.prompts)
        if longest + request.sampling.max_tokens > facts.max_model_len:
            raise BadRequest(
                f"got a prompt of {longest} tokens and max_tokens {request.sampling.max_tokens}, expected at most "
                f"{facts.max_model_len} together (the model's max_model_len). Shorten one of them."
            )
        largest = max([*request.sampling.stop_token_ids, *(max(prompt.token_ids) for prompt in request.prompts)])
        if largest >= facts.vocab_size:
            raise BadRequest(
                f"got token id {largest}, expected ids below the vocabulary's size {facts.vocab_size}. "
                "Does the trainer use this model's tokenizer?"
            )

    async def set(self, version: Version, wanted: SetWeights) -> ServedWeights:
        """Serve `version`; answers when it does. Setting what already serves does nothing.

        Raises:
            SwitchInProgress: another switch is under way.
            OlderVersion: a newer version serves.
            WeightsNotVisible, WeightsRefused: found before the engine was touched; the old version goes on serving.
            SwitchFailed: loading failed and the old version was loaded back.
            WeightsRefused: the same, for the last time.
            PolicyTorn: loading back failed too.
        """
        if self._switching.locked():
            raise SwitchInProgress(f"got PUT of version {version} while another switch is under way; ask again")
        async with self._switching:
            try:
                return await self._switch(version, wanted)
            except TandemError as error:
                metrics.SWITCH_FAILURES.labels(error.code).inc()
                raise

    async def _switch(self, version: Version, wanted: SetWeights) -> ServedWeights:
        if version == self.version and wanted.manifest_digest == self._serving.manifest_digest:
            return self.served
        if version < self.version:
            raise OlderVersion(
                f"got version {version}; version {self.version} serves and is newer. A resumed trainer publishes "
                "under a new attempt number (WeightStore.next_attempt)."
            )
        began = time.monotonic()
        try:
            target = await self._verified(version, wanted.manifest_digest)
            verified = time.monotonic()
            paused, loaded = await self._pause_load_resume(target, wanted.mode)
        finally:
            await self._lease.hold(self.version)
        ended = time.monotonic()
        metrics.SWITCH_SECONDS.observe(ended - began)
        timings = SwitchTimings(
            verify_s=verified - began, pause_s=paused - verified, load_s=loaded - paused, total_s=ended - began
        )
        log.info("serving version %s: %s", version, timings)
        return self.served.model_copy(update={"timings": timings})

    async def _verified(self, version: Version, digest: str) -> _Serving:
        """`version`, leased, after everything that can be checked without touching the model."""
        manifest, found = await self._visible(version)
        if found != digest:
            raise WeightsRefused(
                f"version {version} in {self._store.root} has manifest digest {found}, expected {digest}. Another run "
                "or another attempt wrote it: give each run its own shared.weights_dir, and publish again."
            )
        check_model(manifest, self.engine.facts)
        await self._lease.hold(version, self.version)
        await asyncio.to_thread(self._store.verify, manifest)
        directory = self._store.directory(version)
        return _Serving(version, digest, tuple(directory / file.name for file in manifest.files), manifest.kind)

    async def _visible(self, version: Version) -> tuple[Manifest, str]:
        """Read the manifest as soon as this side of the shared volume shows it, or raise WeightsNotVisible."""
        deadline = time.monotonic() + self._config.visible_timeout_s
        while True:
            try:
                return await asyncio.to_thread(self._store.read, version)
            except WeightsNotVisible:
                if self.stopping or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(0.05)

    async def _pause_load_resume(self, target: _Serving, mode: SwitchMode) -> tuple[float, float]:
        """Returns when the engine was paused and when the weights were loaded, on the monotonic clock."""
        if target.kind != self._serving.kind and mode is SwitchMode.IN_FLIGHT:
            mode = SwitchMode.ABORT  # a request that began without an adapter could not go on with one
        try:
            async with asyncio.timeout(self._config.switch_timeout_s):
                await self.engine.pause(mode)
        except Exception as error:
            await self.engine.resume()
            raise SwitchFailed(
                f"the engine did not pause for version {target.version} within {self._config.switch_timeout_s:g} s "
                f"({error!r}); version {self.version} goes on. If long requests hold it up, use mode in_flight or "
                "raise generator.switch_timeout_s."
            ) from error
        paused = time.monotonic()
        try:
            await self._load(target)
        except Exception as error:
            await self._roll_back(target, error)
        self._serving = target
        metrics.WEIGHT_STEP.set(target.version.step)
        metrics.WEIGHT_ATTEMPT.set(target.version.attempt)
        loaded = time.monotonic()
        await self.engine.resume()
        return paused, loaded

    async def _load(self, target: _Serving) -> None:
        async with asyncio.timeout(self._config.switch_timeout_s):
            await self.engine.load_weights(target.version, target.files)

    async def _roll_back(self, target: _Serving, cause: Exception) -> None:
        """Load the last good version back. Always raises: the switch did not happen."""
        version = target.version
        log.error("loading version %s failed half-way: %r; loading %s back", version, cause, self.version)
        self._not_whole = f"loading version {version} failed half-way; version {self.version} is being loaded back"
        try:
            await self._load(self._serving)
        except Exception as error:
            self._not_whole = f"torn between versions {version} and {self.version}; restarting"
            self.failed.set()
            raise PolicyTorn(
                f"loading version {version} failed half-way ({cause}) and so did loading {self.version} back "
                f"({error}); the generator restarts and loads LATEST"
            ) from error
        await self.engine.resume()
        self._not_whole = None
        told = f"loading version {version} failed half-way ({cause}); version {self.version} was loaded back and serves"
        self._failed_loads[version, target.manifest_digest] += 1
        if self._failed_loads[version, target.manifest_digest] < _LOADS:
            raise SwitchFailed(told) from cause
        raise WeightsRefused(
            f"{told}. It failed {_LOADS} times, so it will not be tried again. Fix: the generator's log says what is "
            "wrong with it; publish another version."
        ) from cause

    async def _watch(self) -> None:
        """Have the engine prove that it computes: a hung one looks healthy from outside."""
        silences = 0
        while not self.failed.is_set():
            finished = self._finished_groups
            await asyncio.sleep(self._config.canary_every_s)
            if self._finished_groups != finished or self._switching.locked():
                continue
            try:
                async with asyncio.timeout(self._config.canary_timeout_s):
                    await self.engine.check()
            except Exception as error:
                silences += 1
                self._hung = f"the engine did not produce a token, {silences} times in a row: {error!r}"
                if silences == _SILENCES:
                    self.failed.set()
            else:
                silences, self._hung = 0, None
