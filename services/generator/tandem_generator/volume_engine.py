"""Runs in vLLM's workers: copies mapped safetensors from the shared volume into the live model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from .rehearsal import stale_tensors

BACKEND = "tandem_volume"


@dataclass
class VolumeInitInfo(WeightTransferInitInfo):
    """The volume is mounted already."""

    shards: list[str] = field(default_factory=list)
    """Safetensors of the weights that the model holds; with them, a switch is tried out."""


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

    def init_transfer_engine(self, init_info: VolumeInitInfo) -> None:
        """Refuse a model whose weights cannot be switched by a copy over its parameters.

        Raises:
            ValueError: it is quantized, a mixture of experts, encodes positions by what else is in a batch, or holds
                something that vLLM has made of its weights.
        """
        self._refuse_kinds()
        self._refuse_changing_rope()
        if init_info.shards:
            self._refuse_stale_tensors(init_info.shards)

    def _refuse_kinds(self) -> None:
        experts = next((name for name, module in self.model.named_modules() if isinstance(module, MoERunner)), None)
        kind = "quantized" if self.model_config.quantization else experts and f"a mixture of experts ({experts})"
        if kind:
            raise ValueError(
                f"{self.model_config.model!r} is {kind}, expected a dense model without quantization. vLLM stores such "
                "weights in another layout, which a switch of weights would not reach. Fix: choose another shared.model"
            )

    def _refuse_changing_rope(self) -> None:
        """vLLM's own encodings are chosen once; those of its Transformers backend change with the longest request."""
        length = self.model_config.max_model_len
        for module in self.model.modules():
            original = getattr(module, "original_max_seq_len", None)
            if original is None or not isinstance(module.rope_type, str):
                continue
            parameters = module.config.rope_parameters
            longest = {"dynamic": original, "longrope": parameters.get("original_max_position_embeddings")}
            limit = longest.get(module.rope_type)
            if limit is not None and length > limit:
                raise ValueError(
                    f"{self.model_config.model!r} runs on vLLM's Transformers backend, whose rope_type "
                    f"{module.rope_type!r} encodes positions by the longest request of a batch: got max_model_len "
                    f"{length}, expected at most {limit}. Fix: set generator.max_model_len: {limit}"
                )

    def _refuse_stale_tensors(self, shards: list[str]) -> None:
        def process() -> None:
            process_weights_after_loading(self.model, self.model_config, self.device)

        with set_current_vllm_config(self.vllm_config):
            stale = stale_tensors(self.model, lambda: self._load(shards), process)
        if stale:
            raise ValueError(
                f"{self.model_config.model!r} cannot be given other weights while it serves: of its tensors "
                f"{', '.join(stale[:3])} ({len(stale)} in all) are not copies of the checkpoint's. Fix: choose a "
                "shared.model of another architecture (docs/reference/architectures.md)"
            )

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters are overwritten in place."""

    def receive_weights(self, update_info: VolumeUpdateInfo) -> None:
        """Copy all shards into the model.

        Raises:
            ValueError: the shards leave parameters of the model untouched.
        """
        self._load(update_info.shards)

    def _load(self, shards: list[str]) -> None:
        with torch.no_grad():
            loaded = self.model.load_weights(_tensors(shards))
        missing = {name for name, _ in self.model.named_parameters()} - set(loaded)
        if missing:
            raise ValueError(
                f"{self.model_config.model!r} has {len(missing)} parameters that these weights do not reach, such as "
                f"{min(missing)}; expected weights for all of them"
            )

    def finish_weight_update(self) -> None:
        """Nothing to finalize."""

    def shutdown(self) -> None:
        """Nothing to release."""


def _tensors(shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in shards:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)
