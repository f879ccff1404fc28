"""Weight loading in vLLM's workers: copy memory-mapped safetensors into the parameters of the running model."""

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

from .switch_rehearsal import stale_tensors

BACKEND = "tandem_volume"


@dataclass
class VolumeInitInfo(WeightTransferInitInfo):
    """What the workers get once, at the start."""

    shards: list[str] = field(default_factory=list)
    """Safetensors files of the weights that the model already has. If there are any, a switch is tested with them."""


@dataclass
class VolumeUpdateInfo(WeightTransferUpdateInfo):
    """What the workers get for each switch."""

    shards: list[str]
    """Verified safetensors files of the version."""


class VolumeWeightEngine(WeightTransferEngine[VolumeInitInfo, VolumeUpdateInfo]):
    """Weight transfer through a file system. Every worker maps the same files and copies its part of them.

    `receive_weights` does all the work in one call. If it fails, the caller loads the previous version again.
    """

    init_info_cls = VolumeInitInfo
    update_info_cls = VolumeUpdateInfo

    def init_transfer_engine(self, init_info: VolumeInitInfo) -> None:
        """Refuse a model whose weights cannot be switched by copying over its parameters.

        Raises:
            ValueError: The model is quantized, is a mixture of experts, encodes positions depending on other requests
                in the batch, or computes with tensors that vLLM derived from its weights.
        """
        self._refuse_kinds()
        self._refuse_changing_rope()
        if init_info.shards:
            self._refuse_stale_tensors(init_info.shards)

    def _refuse_kinds(self) -> None:
        experts = next((name for name, module in self.model.named_modules() if isinstance(module, MoERunner)), None)
        if self.model_config.quantization:
            kind = "quantized"
        elif experts:
            kind = f"a mixture of experts ({experts})"
        else:
            kind = None
        if kind:
            raise ValueError(
                f"{self.model_config.model!r} is {kind}, expected a dense model without quantization. vLLM stores such "
                "weights in another layout, which a switch would not update. Fix: choose another shared.model"
            )

    def _refuse_changing_rope(self) -> None:
        """Refuse position encodings that change with the longest request of a batch.

        Only vLLM's Transformers backend has such encodings. vLLM's own implementations choose them once.
        """
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
                f"the weights of {self.model_config.model!r} cannot be switched while it is loaded: {len(stale)} of "
                f"its tensors are not copies of checkpoint tensors, such as {', '.join(stale[:3])}. Fix: choose a "
                "shared.model of another architecture (docs/reference/architectures.md)"
            )

    def start_weight_update(self) -> None:
        """Do nothing: parameters are overwritten in place."""

    def receive_weights(self, update_info: VolumeUpdateInfo) -> None:
        """Copy all shards into the model.

        Raises:
            ValueError: The shards do not contain all parameters of the model.
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
        """Do nothing: `receive_weights` has finished the update."""

    def shutdown(self) -> None:
        """Do nothing: there is nothing to release."""


def _tensors(shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in shards:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)
