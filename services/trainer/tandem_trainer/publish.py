"""Publish the policy: write a version to the store, commit it, switch all generators to it, delete old versions.

All of that may run behind the next update. Only a copy of the tensors in host memory is made before it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from anyio import to_thread
from anyio.from_thread import BlockingPortal
from torch import Tensor
from transformers import PreTrainedModel

from tandem_protocol.chains import is_complete
from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.errors import TandemError, WeightsRefused
from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.manifest import Manifest
from tandem_protocol.messages import ModelFingerprint, ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

from .completion import Completion
from .deltas import Deltas
from .devices import HostMemory, copies_before_writing
from .learner.lora import ADAPTER_FILE, adapter_table, adapter_tensors, has_adapter, save_adapter_config
from .learner.shards import model_shapes, model_table, model_tensors, part_files
from .publication import Part, Publication
from .published_copy import MAX_DELTA
from .ranks import together
from .sending import send_while_stored
from .volumes import how_to_enlarge

log = logging.getLogger(__name__)

VISIBLE_S, VISIBLE_PAUSE_S = 60.0, 2.0
"""How long a generator may refuse a version whose complete files were added, and the pause between two requests. A
network file system shows added files late."""
HEADER_BYTES = 1 << 20
"""Space that the headers of safetensors files and the manifest need at most."""


class Publisher:
    """Publishes the versions of one `attempt`, that is, of one start of the trainer. At most one is in flight."""

    def __init__(
        self,
        *,
        store: WeightStore,
        client: GeneratorClient,
        portal: BlockingPortal,
        wait: Callable[[Future[None] | None], object],
        config: PublishConfig,
        run_name: str,
        attempt: int,
        model_fingerprint: ModelFingerprint,
        dtype: torch.dtype,
        accelerator: Accelerator,
        report: Callable[[dict[str, float], int], object] = lambda _timings, _bytes: None,
    ) -> None:
        """
        Args:
            report: receives the seconds of each phase and the number of bytes of a version that is served.
        """
        self._store = store
        self._client = client
        self._portal = portal
        self._wait = wait
        self._config = config
        self._run_name = run_name
        self._attempt = attempt
        self._fingerprint = model_fingerprint
        self._dtype = dtype
        self._accelerator = accelerator
        self._report = report
        self._deltas = Deltas(config.delta, dtype, store, accelerator, client)
        self._is_tried = False
        self._table: dict[str, Tensor] | None = None
        self._memory: HostMemory | None = None
        self._task: Future[None] | None = None
        self._publication: Publication | None = None
        self._completion: Completion | None = None
        self._again: asyncio.Task[None] | None = None
        self._current: tuple[Publication, Manifest, SetWeights] | None = None
        client.on_stale = self.send_again

    @property
    def in_flight(self) -> Future[None] | None:
        """Ends when the version in flight is served. None if there is none."""
        return self._task

    def __call__(self, model: PreTrainedModel, step: int, *, behind: bool = False) -> Version:
        """Publish `model` as the policy after `step` steps. Waits for the version in flight first.

        Args:
            behind: return when the tensors are copied, so that the parameters may change. The version is written and
                loaded behind the next update. `wait`, or the next call, raises an error of that. The first version is
                always waited for: it shows problems before the first rollout.

        Raises:
            StoreError: the volume is full.
            TandemError: a generator refused the version.
            TimeoutError: a generator did not serve it in time.
        """
        self.wait()
        together(self._accelerator, self._forget)
        behind = behind and self._is_tried
        version = Version(step, self._attempt)
        if self._accelerator.is_main_process and not self._is_tried:
            # An earlier run may have kept more versions, or have ended because the volume was full.
            self._store.retain(self._config.keep)
        with ExitStack() as stack:
            self._publication = publication = self._staged(version, model, stack)
            copies = behind or copies_before_writing(self._accelerator.device)
            write = self._copied(publication) if copies else self._written(publication)
            self._completion = self._completion_of(publication)
            if publication.plan and not self._accelerator.is_main_process:
                self._portal.start_task_soon(to_thread.run_sync, self._completion.stand_by)
            if behind:
                self._portal.call(self._client.expect, version)
            self._task = self._portal.start_task_soon(self._finish, publication, write, stack.pop_all())
        if not behind:
            self.wait()
        self._is_tried = True
        return version

    def wait(self) -> None:
        """Wait until the version in flight is served, if there is one. Every rank calls it at the same time.

        Raises:
            StoreError, TandemError, TimeoutError: as for a call.
        """
        if self._task is None:
            return
        task, self._task = self._task, None
        try:
            self._wait(task)
        except BaseException:
            self._give_up()  # a thread that still waits for other ranks must not, if this rank ends with an error
            raise

    def close(self) -> None:
        """Give up the version in flight. If it is being written, the portal waits for that before it ends."""
        self._give_up()
        if self._task is not None:
            self._task.cancel()
        self._portal.call(self._stop_sending)

    def _give_up(self) -> None:
        if self._publication is not None:
            self._publication.is_given_up.set()

    def _part(self, model: PreTrainedModel) -> Part:
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        if has_adapter(model):
            table = adapter_table(model, self._dtype)
            files = {ADAPTER_FILE: table} if self._accelerator.is_main_process else {}
            return Part("lora", files, adapter_tensors(model, self._dtype), _size_bytes(table))
        self._table = table = self._table or model_table(model, self._dtype)
        files = part_files(table, rank=rank, ranks=ranks)
        return Part("full", files, model_tensors(model, self._dtype), _size_bytes(table))

    def _staged(self, version: Version, model: PreTrainedModel, stack: ExitStack) -> Publication:
        """Make the staging folder, until `stack` ends. The main process does it, and fails if the volume is full."""
        part = self._part(model)
        plan = self._deltas.plan(version, part)
        needs_bytes = part.version_bytes + HEADER_BYTES
        fix = how_to_enlarge(needs_bytes, self._config.keep)
        staging = partial(self._store.staging, version, fix=fix)

        def stage() -> None:
            if self._accelerator.is_main_process:
                delta_bytes = int(MAX_DELTA * part.version_bytes) if plan and plan.complete else 0
                folder = stack.enter_context(staging(needs_bytes=needs_bytes + delta_bytes))
                if part.kind == "lora":
                    save_adapter_config(model, folder)

        together(self._accelerator, stage)
        staging = partial(staging, needs_bytes=needs_bytes)
        return Publication(version, part, partial(staging, owner=False), plan, self._deltas.writer(plan))

    def _written(self, publication: Publication) -> Callable[[], dict[str, str]]:
        """Write the version. Returns what gives the digests of all files."""
        tensors = publication.part.own(publication.clock, lambda _, tensor: tensor.cpu().contiguous())
        written = together(self._accelerator, publication.write, tensors)
        with publication.clock.phase("write"):  # the other ranks may still write
            digests = dict(gather_object(list(written.items())))
        return lambda: digests

    def _copied(self, publication: Publication) -> Callable[[], dict[str, str]]:
        """Copy this rank's tensors into host memory. Returns what writes them, and gives the digests of all files."""
        part, clock = publication.part, publication.clock
        with clock.phase("copy"):
            memory = self._memory or together(self._accelerator, HostMemory, part.table, self._accelerator.device)
        self._memory = memory
        tensors = list(part.own(clock, memory.copy))
        with clock.phase("copy"):
            memory.wait()
        return partial(
            publication.write_behind,
            tensors,
            rank=self._accelerator.process_index,
            ranks=self._accelerator.num_processes,
            timeout_s=self._config.timeout_s,
        )

    async def _finish(self, publication: Publication, write: Callable[[], dict[str, str]], staging: ExitStack) -> None:
        """Commit a version, have all generators serve it, and delete old ones. Other ranks only write their part."""
        committed = await to_thread.run_sync(self._commit, publication, write, staging)
        if committed is None:
            return
        manifest, digest = committed
        weights = SetWeights(manifest_digest=digest, mode=self._config.mode)
        size_bytes = self._deltas.committed(manifest, digest, publication.clock.seconds["write"])
        served = await self._serve(publication, manifest, weights)
        self._deltas.served()
        self._current = publication, manifest, weights
        self._report(
            publication.timings(served.values()), size_bytes if publication.plan else publication.part.version_bytes
        )
        await to_thread.run_sync(self._store.retain, self._config.keep)
        if publication.plan:
            await to_thread.run_sync(self._deltas.look)

    async def _serve(
        self, publication: Publication, manifest: Manifest, weights: SetWeights
    ) -> dict[str, ServedWeights]:
        """Have all generators serve a version. If one refuses its deltas, add its complete files first."""
        send = partial(
            send_while_stored, self._client, self._store, publication.version, weights, self._config.timeout_s
        )
        try:
            return await send()
        except WeightsRefused as error:
            if not manifest.delta or not self._completion or is_complete(self._store, manifest):
                raise
            self._deltas.refused(manifest, error)
            await to_thread.run_sync(self._completion.add, manifest)
        deadline = time.monotonic() + VISIBLE_S
        while True:
            try:
                return await send()
            except WeightsRefused:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(VISIBLE_PAUSE_S)

    def send_again(self, at_least: Version) -> None:
        """Send the version that is served again, for a generator that has started, and could not load it.

        Nothing happens if it is older than `at_least`, or while a version is on its way.
        """
        is_idle = self._again is None or self._again.done()
        if self._current and self._current[0].version >= at_least and is_idle:
            self._again = asyncio.create_task(self._serve_again(*self._current))

    async def _serve_again(self, publication: Publication, manifest: Manifest, weights: SetWeights) -> None:
        try:
            await self._serve(publication, manifest, weights)
        except (TandemError, TimeoutError, OSError) as error:  # other generators may serve it
            log.warning("Version %s was sent again, but not every generator serves it: %s", manifest.version, error)

    def _forget(self) -> None:
        """Neither send the last version again nor write its files, because their copy is about to change."""
        self._give_up()
        self._portal.call(self._stop_sending)
        if self._completion is not None:
            self._completion.end()

    async def _stop_sending(self) -> None:
        self._current = None
        if self._again:
            self._again.cancel()
            await asyncio.wait([self._again])

    def _commit(
        self, publication: Publication, write: Callable[[], dict[str, str]], staging: ExitStack
    ) -> tuple[Manifest, str] | None:
        """Commit the version when all ranks have written. Returns its manifest and the digest, None on other ranks."""
        with staging:
            digests = write()
            if not self._accelerator.is_main_process:
                return None
            with publication.clock.phase("commit"), publication.staging() as staged:
                return self._store.commit(
                    staged,
                    publication.version,
                    run=self._run_name,
                    fingerprint=self._fingerprint,
                    kind=publication.part.kind,
                    digests=digests,
                    parent=self._deltas.parent(publication.plan),
                )

    def _completion_of(self, publication: Publication) -> Completion:
        return Completion(
            publication,
            self._store,
            self._deltas.write_complete,
            rank=self._accelerator.process_index,
            ranks=self._accelerator.num_processes,
            timeout_s=self._config.timeout_s,
        )


def _size_bytes(table: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in table.values())


def fingerprint_of(model: PreTrainedModel, model_dir: Path) -> ModelFingerprint:
    """Fingerprint of the model in training, including its parameter table."""
    return fingerprint(model_dir, model_shapes(model))
