"""Publish the policy: write a version to the store, commit it, switch all generators to it, delete old versions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from anyio.from_thread import BlockingPortal
from transformers import PreTrainedModel

from tandem_protocol.config.trainer import PublishConfig
from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.messages import Kind, ModelFingerprint, ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

from .learner.lora import adapter_table, has_adapter, write_adapter
from .learner.shards import model_shapes, model_table, model_tensors, write_part
from .ranks import together
from .volumes import how_to_enlarge

HEADER_BYTES = 1 << 20
"""Space that the headers of safetensors files and the manifest need at most."""


class Publisher:
    """Publishes the versions of one `attempt`, that is, of one start of the trainer."""

    def __init__(
        self,
        *,
        store: WeightStore,
        client: GeneratorClient,
        portal: BlockingPortal,
        wait: Callable[[Future[dict[str, ServedWeights]] | None], object],
        config: PublishConfig,
        run_name: str,
        attempt: int,
        model_fingerprint: ModelFingerprint,
        dtype: torch.dtype,
        accelerator: Accelerator,
    ) -> None:
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

    def __call__(self, model: PreTrainedModel, step: int) -> Version:
        """Publish `model` as the policy after `step` steps, and wait until every generator serves it.

        Raises:
            StoreError: the volume is full.
            TandemError: a generator refused the version.
            TimeoutError: a generator did not serve it in time.
        """
        version = Version(step, self._attempt)
        is_main = self._accelerator.is_main_process
        if is_main:
            # An earlier run may have kept more versions, or have ended because the volume was full.
            self._store.retain(self._config.keep)
        digest = self._write(model, version)
        task = None
        if is_main:
            weights = SetWeights(manifest_digest=digest, mode=self._config.mode)
            task = self._portal.start_task_soon(self._client.set_weights, version, weights, self._config.timeout_s)
        self._wait(task)  # the other ranks wait for the main process
        together(self._accelerator, self._store.retain if is_main else lambda _: None, self._config.keep)
        return version

    def _write(self, model: PreTrainedModel, version: Version) -> str:
        """Write this rank's part of the version.

        Returns the manifest's digest on the main process, "" on all others.
        """
        rank = self._accelerator.process_index
        ranks = self._accelerator.num_processes
        is_main = self._accelerator.is_main_process
        kind: Kind = "lora" if has_adapter(model) else "full"
        table = adapter_table(model, self._dtype) if kind == "lora" else model_table(model, self._dtype)
        needs_bytes = sum(tensor.nbytes for tensor in table.values()) + HEADER_BYTES
        fix = how_to_enlarge(needs_bytes, self._config.keep)
        with ExitStack() as stack:

            def stage() -> Path:
                return stack.enter_context(
                    self._store.staging(version, needs_bytes=needs_bytes, fix=fix, owner=is_main)
                )

            # The main process goes first: it makes the folder, and fails if the volume is full.
            staged = together(self._accelerator, stage if is_main else lambda: None) or stage()
            if kind == "lora":
                written = write_adapter(model, staged, self._dtype, is_main=is_main)
            else:
                written = write_part(staged, table, model_tensors(model, self._dtype), rank=rank, ranks=ranks)
            digests = dict(gather_object(list(written.items())))
            if not is_main:
                return ""
            _, digest = self._store.commit(
                staged, version, run=self._run_name, fingerprint=self._fingerprint, kind=kind, digests=digests
            )
            return digest


def fingerprint_of(model: PreTrainedModel, model_dir: Path) -> ModelFingerprint:
    """Fingerprint of the model in training, including its parameter table."""
    return fingerprint(model_dir, model_shapes(model))
