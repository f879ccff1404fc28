"""Runs in vLLM's workers: copies mapped safetensors from the shared volume into the live model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BACKEND = "tandem_volume"


@dataclass
class VolumeInitInfo(WeightTransferInitInfo):
    """Nothing: the volume is mounted."""


@dataclass
class VolumeUpdateInfo(WeightTransferUpdateInfo):
    """The verified shards of one version."""

    shards: list[str]


class VolumeWeightEngine(WeightTransferEngine[VolumeInitInfo, VolumeUpdateInfo]):
    """Weight transfer through a file system: every worker maps the same files and takes its part of them.

    All the work is one call of `receive_weights`, so that a failure has one place and the caller can load the last
    good version over it.
    """

    init_info_cls = VolumeInitInfo
    update_info_cls = VolumeUpdateInfo

    def init_transfer_engine(self, init_info: VolumeInitInfo) -> None:  # noqa: ARG002 - vLLM's signature
        """Refuse a model whose loaded parameters are no plain copies of the checkpoint's.

        Raises:
            ValueError: quantized or mixture-of-experts model; a copy in place would be silently wrong.
        """
        if self.model_config.quantization or self.model_config.is_moe:
            raise ValueError(
                f"got {self.model_config.model!r}, which is quantized or a mixture of experts; Tandem switches the "
                "weights of dense, unquantized models only"
            )

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters are overwritten in place."""

    def receive_weights(self, update_info: VolumeUpdateInfo) -> None:
        """Copy all shards into the model.

        Raises:
            ValueError: the shards leave parameters of the model untouched.
        """
        with torch.no_grad():
            loaded = self.model.load_weights(_tensors(update_info.shards))
        missing = {name for name, _ in self.model.named_parameters()} - set(loaded)
        if missing:
            raise ValueError(f"the version lacks weights for {len(missing)} parameters, such as {min(missing)}")

    def finish_weight_update(self) -> None:
        """Nothing to finalize."""

    def shutdown(self) -> None:
        """Nothing to release."""


def _tensors(shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in shards:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)
