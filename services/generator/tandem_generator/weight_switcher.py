"""Switch the served version: verify, pause, load, resume. Roll back if loading fails half-way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator

from tandem_protocol.config.generator import GeneratorConfig
from tandem_protocol.errors import (
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
from tandem_protocol.messages import Group, RolloutRequest, ServedWeights, SetWeights, SwitchMode, SwitchTimings
from tandem_protocol.repeats import Repeats
from tandem_protocol.store import WeightStore
from tandem_protocol.version import BASE, Version

from . import metrics
from .canary import Canary
from .changes import Changes
from .compatibility import check_request_fits, check_version_fits
from .engines.base import Engine, OnTokens, no_count
from .lease import LeaseKeeper
from .materializer import Materializer
from .stored_versions import Loadable, StoredVersions

log = logging.getLogger(__name__)

_MAX_FAILED_LOADS = 3
"""A version is refused permanently after this number of failed loads."""


class WeightSwitcher:
    """Decides which weights the engine holds, and whether requests are answered.

    Only `set` calls the engine's `pause`, `load_weights` and `resume`. While it runs, further calls are refused instead
    of queued. `rollouts` may be called at any time. `failed` is set when the process must restart; the server waits
    for it. `stopping` is True after `stop`. `stored` must be closed at the end, which `close` does.
    """

    def __init__(self, engine: Engine, store: WeightStore, config: GeneratorConfig) -> None:
        self.engine = engine
        self.generator_id = config.replica
        self.failed = asyncio.Event()
        self.stopping = False
        materializer = Materializer(store, config.materialize_dir, self.generator_id)
        self.stored = StoredVersions(store, materializer, config.visible_timeout_s, is_stopping=lambda: self.stopping)
        self._config = config
        self._serving = Loadable(BASE, None, ())
        self._not_loaded: str | None = "the engine is starting"
        self._lease = LeaseKeeper(store, self.generator_id)
        self._switching = asyncio.Lock()
        self._changes = Changes()
        self._repeats = Repeats(log)
        self._failed_loads: Counter[tuple[Version, str | None]] = Counter()
        self._finished_groups = 0
        self._canary = Canary(
            engine,
            config,
            finished_groups=lambda: self._finished_groups,
            is_switching=self._switching.locked,
            failed=self.failed,
        )
        self._tasks: list[asyncio.Task[None]] = []
        metrics.READY.set_function(lambda: self.not_ready is None)

    @property
    def version(self) -> Version:
        """The version that is served."""
        return self._serving.version

    @property
    def served(self) -> ServedWeights:
        """The version that is served, with the digest of its manifest."""
        return ServedWeights(version=self.version, manifest_digest=self._serving.manifest_digest)

    @property
    def not_ready(self) -> str | None:
        """Why requests are not answered. None if they are."""
        return "it is stopping" if self.stopping else self._not_loaded or self._canary.hung

    async def start(self) -> None:
        """Start the engine, and load the newest version in the store.

        Without the second step, a restarted generator would serve base weights in the middle of a run.

        Raises:
            TandemError: No version in the store can be served.
        """
        await self.engine.start()
        self._serving = Loadable(BASE, None, self.engine.facts.base_shards)
        await self.stored.clear()
        await self._catch_up()
        self._not_loaded = None
        self._changes.notify()
        log.info("ready, serving version %s", self.version)
        self._tasks = [asyncio.create_task(self._lease.keep()), asyncio.create_task(self._canary.watch())]

    def stop(self) -> None:
        """Refuse new requests, and stop waiting for versions. Running requests continue."""
        self.stopping = True
        self._changes.notify()

    async def close(self) -> None:
        """Stop, give the lease back, and close the engine."""
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._lease.hold()
        await self.engine.close()
        self.stored.close()

    async def _catch_up(self) -> None:
        """Serve `LATEST`, or the newest undamaged version if `LATEST` is damaged. An empty store changes nothing.

        Falling back is safe: the trainer enforces `min_version`. If the files of deltas cannot be made, nothing is
        loaded: the trainer sends the version again when it learns that, and completes it if this generator refuses it.
        """
        problems: list[TandemError] = []
        tried: set[Version] = set()
        has_deltas = False
        while (version := await self.stored.newest(but=tried)) is not None:
            tried.add(version)
            try:
                manifest, digest = await self.stored.read(version, if_latest=True)
                check_version_fits(manifest, self.engine.facts)
                has_deltas = has_deltas or manifest.delta is not None
                await self.set(version, SetWeights(manifest_digest=digest, mode=SwitchMode.ABORT))
                return
            except (WeightsNotVisible, WeightsRefused, SwitchFailed) as error:
                log.error("cannot start with version %s: %s", version, error)
                problems.append(error)
        if problems and not has_deltas:
            raise WeightsRefused(
                f"none of the {len(problems)} versions in {self.stored.root} can be served; the newest: {problems[0]} "
                "If the store belongs to another model or run, set shared.weights_dir to a new folder. If its files "
                f"are damaged, delete {self.stored.root}: a resumed trainer publishes its weights again."
            )

    async def wait_for(self, at_least: Version, timeout_s: float) -> ServedWeights:
        """Return the served version as soon as it is `at_least` or newer.

        Raises:
            StalePolicy: An older version is still served after `timeout_s` seconds.
            NotReady: The generator is stopping.
        """
        await self._changes.until(lambda: self.stopping or self._serves(at_least), timeout_s)
        if self._serves(at_least):
            return self.served
        if self.stopping:
            raise NotReady(f"this generator is not ready: {self.not_ready}. Fix: use another replica.")
        raise StalePolicy(
            f"got at_least {at_least}; this generator serves {self.version} after {timeout_s:g} s. Fix: publish the "
            f"version with PUT /weights/{at_least}, or wait longer with wait_s."
        )

    def _serves(self, at_least: Version) -> bool:
        return self.version >= at_least and self._not_loaded is None

    def rollouts(self, request: RolloutRequest, on_tokens: OnTokens = no_count) -> AsyncGenerator[Group, None]:
        """Sample completions. Each group is yielded when it is finished.

        Iterating may raise `EngineFailed`.

        Args:
            request: What to sample.
            on_tokens: Called while completions are sampled, at least if the request has `heartbeat_s`.

        Raises:
            NotReady: The generator does not answer requests now.
            StalePolicy: The served version is older than `request.min_version`.
            BadRequest: The request does not fit the model.
        """
        self._admit(request)
        return self._stream(request, on_tokens)

    async def _stream(self, request: RolloutRequest, on_tokens: OnTokens) -> AsyncGenerator[Group, None]:
        metrics.REQUESTS_RUNNING.inc()
        finished = 0
        try:
            async with contextlib.aclosing(self.engine.generate(request, on_tokens)) as groups:
                async for group in groups:
                    finished += 1
                    self._finished_groups += 1
                    metrics.ROLLOUT_COMPLETIONS.inc(len(group.completions))
                    metrics.ROLLOUT_TOKENS.inc(sum(len(completion.token_ids) for completion in group.completions))
                    yield group
        except (asyncio.CancelledError, GeneratorExit):
            self._lost(logging.INFO, "its client has left", finished, request)
            raise
        except TandemError as error:
            self._lost(logging.WARNING, str(error), finished, request, error.code)
            raise
        finally:
            metrics.REQUESTS_RUNNING.dec()

    def _lost(self, level: int, reason: str, finished: int, request: RolloutRequest, code: str = "left") -> None:
        """Log that a request ended before all of its groups were sampled."""
        groups = len(request.prompts)
        if lost := groups - finished:
            message = f"lost {lost} of {groups} groups of a request for rollouts: {reason}"
            self._repeats.say(level, code, message, lost=lost, groups=groups, reason=reason)

    def _admit(self, request: RolloutRequest) -> None:
        if self.not_ready:
            raise NotReady(f"this generator is not ready: {self.not_ready}. Fix: try later, or use another replica.")
        if request.min_version and self.version < request.min_version:
            raise StalePolicy(
                f"got min_version {request.min_version}; this generator serves {self.version}. Fix: publish the "
                f"version with PUT /weights/{request.min_version}, or try again after that."
            )
        check_request_fits(request, self.engine.facts)

    async def set(self, version: Version, request: SetWeights) -> ServedWeights:
        """Switch to `version`, and return when it is served. If it is already served, nothing happens.

        After every error except `PolicyTorn`, the old version is served.

        Args:
            version: The version to serve.
            request: Digest of its manifest, and what happens to running requests.

        Raises:
            SwitchInProgress: Another switch is running.
            OlderVersion: The served version is newer.
            WeightsNotVisible: The version did not appear in the store in time.
            WeightsRefused: The version is damaged, belongs to another model, or has failed to load three times.
            SwitchFailed: The engine did not pause in time, or loading failed.
            PolicyTorn: Loading failed, and so did loading the old version again. The process must restart.
        """
        if self._switching.locked():
            raise SwitchInProgress(f"got PUT of version {version} during another switch. Fix: try again later.")
        async with self._switching:
            try:
                return await self._switch(version, request)
            except TandemError as error:
                metrics.SWITCH_FAILURES.labels(error.code).inc()
                message = f"version {version} is not served ({error.code}): {error}"
                name = str(version)
                self._repeats.say(logging.WARNING, f"{name} {error.code}", message, version=name, code=error.code)
                raise

    async def _switch(self, version: Version, request: SetWeights) -> ServedWeights:
        if version == self.version and request.manifest_digest == self._serving.manifest_digest:
            return self.served
        if version < self.version:
            raise OlderVersion(
                f"got version {version}, expected one that is newer than the served version {self.version}. Fix: a "
                "resumed trainer must publish under a new attempt number (WeightStore.next_attempt)."
            )
        began = time.monotonic()
        try:
            target, visible = await self._verified(version, request.manifest_digest)
            verified = time.monotonic()
            paused, loaded = await self._pause_load_resume(target, request.mode)
        finally:
            await self._lease.hold(self.version)
        ended = time.monotonic()
        metrics.SWITCH_SECONDS.observe(ended - began)
        timings = SwitchTimings(
            visible_s=visible - began,
            verify_s=verified - began,
            pause_s=paused - verified,
            load_s=loaded - paused,
            total_s=ended - began,
        )
        log.info("serving version %s, switched in %.2f s", version, timings.total_s)
        return self.served.model_copy(update={"timings": timings})

    async def _verified(self, version: Version, digest: str) -> tuple[Loadable, float]:
        """Lease `version`, and check everything that can be checked without changing the model.

        Returns:
            The version, and when its manifest was visible, in monotonic seconds.
        """
        manifest = await self.stored.manifest(version, digest)
        visible = time.monotonic()
        check_version_fits(manifest, self.engine.facts)
        await self._lease.hold(version, self.version)
        in_use, one_host = self._serving.files, self.engine.facts.one_host
        return await self.stored.verify(manifest, digest, in_use, one_host=one_host), visible

    async def _pause_load_resume(self, target: Loadable, mode: SwitchMode) -> tuple[float, float]:
        """Switch the engine to `target`. Returns the times of the pause and the load, in monotonic seconds."""
        if target.kind != self._serving.kind and mode is SwitchMode.IN_FLIGHT:
            mode = SwitchMode.ABORT  # a request that started without an adapter cannot continue with one
        try:
            async with asyncio.timeout(self._config.switch_timeout_s):
                await self.engine.pause(mode)
        except Exception as error:
            await self.engine.resume()
            raise SwitchFailed(
                f"the engine did not pause for version {target.version} within {self._config.switch_timeout_s:g} s "
                f"({error!r}); version {self.version} is still served. Fix: if long requests delay the switch, use "
                "mode in_flight or raise generator.switch_timeout_s."
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
        self._changes.notify()
        return paused, loaded

    async def _load(self, target: Loadable) -> None:
        async with asyncio.timeout(self._config.switch_timeout_s):
            await self.engine.load_weights(target.version, target.files)

    async def _roll_back(self, target: Loadable, cause: Exception) -> None:
        """Load the previous version again. Always raises, because the switch has failed."""
        version = target.version
        log.error("loading version %s failed half-way: %r; loading version %s again", version, cause, self.version)
        self._not_loaded = f"loading version {version} failed half-way; version {self.version} is being loaded again"
        try:
            await self._load(self._serving)
        except Exception as error:
            self._not_loaded = f"torn between versions {version} and {self.version}; restarting"
            self.failed.set()
            raise PolicyTorn(
                f"loading version {version} failed half-way ({cause}), and so did loading {self.version} again "
                f"({error}). The generator restarts and loads LATEST."
            ) from error
        await self.engine.resume()
        self._not_loaded = None
        message = f"loading version {version} failed half-way ({cause}); version {self.version} was loaded again"
        self._failed_loads[version, target.manifest_digest] += 1
        if self._failed_loads[version, target.manifest_digest] < _MAX_FAILED_LOADS:
            raise SwitchFailed(f"{message}. Fix: try again.") from cause
        raise WeightsRefused(
            f"{message}. It has failed {_MAX_FAILED_LOADS} times, so it will not be tried again. Fix: see the "
            "generator's log for the cause, and publish another version."
        ) from cause
