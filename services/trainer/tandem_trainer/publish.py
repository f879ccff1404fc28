"""From parameters to what every generator serves: store, commit, switch, retain."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from accelerate import Accelerator
from anyio.from_thread import BlockingPortal
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tandem_protocol.fingerprint import fingerprint
from tandem_protocol.messages import ModelFingerprint, ServedWeights, SetWeights
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

from .client import GeneratorClient
from .config import PublishConfig

MAX_SHARD_BYTES = 4 << 30
HEADER_BYTES = 1 << 20
"""Room for the headers of safetensors files and the manifest."""


class Publisher:
    """Publishes versions of one incarnation (`attempt`) of the trainer."""

    def __init__(
        self,
        *,
        store: WeightStore,
        client: GeneratorClient,
        portal: BlockingPortal,
        wait: Callable[[Future[dict[str, ServedWeights]]], object],
        config: PublishConfig,
        run_name: str,
        attempt: int,
        model_fingerprint: ModelFingerprint,
        dtype: torch.dtype,
        accelerator: Accelerator,
    ) -> None:
        self._accelerator = accelerator
        self._store, self._client, self._portal, self._wait = store, client, portal, wait
        self._config = config
        self._run_name, self._attempt = run_name, attempt
        self._fingerprint, self._dtype = model_fingerprint, dtype

    def __call__(self, model: PreTrainedModel, step: int) -> Version:
        """Make every generator serve `model` as the policy after `step` steps; returns when all do.

        Raises:
            StoreError: the volume is full.
            TandemError, TimeoutError: a generator refused it, or did not serve it in time.
        """
        version = Version(step, self._attempt)
        if self._accelerator.is_main_process:
            self._publish(model, version)
        self._accelerator.wait_for_everyone()
        return version

    def _publish(self, model: PreTrainedModel, version: Version) -> None:
        tensors = published_tensors(model, self._dtype)
        self._store.retain(self._config.keep)  # of an earlier run with another `keep`, or that ended on a full volume
        needs_bytes = sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES
        with self._store.staging(version, needs_bytes=needs_bytes) as staged:
            write_shards(tensors, staged)
            _, digest = self._store.commit(staged, version, run=self._run_name, fingerprint=self._fingerprint)
        weights = SetWeights(manifest_digest=digest, mode=self._config.mode)
        self._wait(self._portal.start_task_soon(self._client.set_weights, version, weights, self._config.timeout_s))
        self._store.retain(self._config.keep)


def published_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors under their names in Hugging Face checkpoints, without those tied to another one."""
    tied = model.all_tied_weights_keys
    state = revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in tied})
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in state.items()
    }


def write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    """Write `tensors` as `shard-….safetensors`.

    Raises:
        OSError: such as ENOSPC when the volume is full.
    """
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="shard{suffix}.safetensors", max_shard_size=MAX_SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        try:
            save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # the store knows what a full volume is
                raise OSError(int(number[1]), str(error)) from error
            raise


def fingerprint_of(model: PreTrainedModel, model_dir: Path) -> ModelFingerprint:
    """Of the model in training, its parameter table included."""
    shapes = {name: tuple(tensor.shape) for name, tensor in published_tensors(model, torch.float32).items()}
    return fingerprint(model_dir, shapes)
