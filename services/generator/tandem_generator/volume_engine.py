"""Weight loading in vLLM's workers: copy memory-mapped safetensors into the parameters of the running model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from .switch_rehearsal import rehearse

BACKEND = "tandem_volume"


@dataclass
class VolumeInitInfo(WeightTransferInitInfo):
    """What the workers get once, at the start."""

    switches: bool = False
    """Whether versions with all parameters will be loaded. If so, a switch is tested."""
    table: dict[str, list[int]] = field(default_factory=dict)
    """Name → shape of the tensors of a version."""
    shards: list[str] = field(default_factory=list)
    """Safetensors files of the weights that the model already has. Empty if they have another format."""


@dataclass
class VolumeUpdateInfo(WeightTransferUpdateInfo):
    """What the workers get for each switch."""

    shards: list[str]
    """Verified safetensors files of the version. Empty: the weights that the model was loaded with."""


class VolumeWeightEngine(WeightTransferEngine[VolumeInitInfo, VolumeUpdateInfo]):
    """Weight transfer through a file system. Every worker maps the same files and copies its part of them.

    `receive_weights` does all the work in one call. If it fails, the caller loads the previous version again.

    The parameters of a dense model are plain copies of a version's tensors, so the tensors are copied over them. The
    kernels for mixtures of experts may need another layout. For those, vLLM's layerwise reload collects the tensors of
    a layer, converts them as at the start, and copies the result over the parameters.
    """

    _filled: dict[str, int] | None = None
    """Layer → number of elements that a complete load fills, for layers that have more elements."""

    init_info_cls = VolumeInitInfo
    update_info_cls = VolumeUpdateInfo

    def init_transfer_engine(self, init_info: VolumeInitInfo) -> None:
        """Refuse a model whose weights cannot be switched while it runs.

        Raises:
            ValueError: The model is of a kind that is not supported, it encodes positions depending on other requests
                in the batch, or a test of a switch does not restore it byte for byte.
        """
        self._refuse_kinds()
        self._refuse_changing_rope()
        if init_info.switches:
            self._rehearse(init_info)

    @property
    def _has_experts(self) -> bool:
        return any(isinstance(module, MoERunner) for module in self.model.modules())

    def _refuse_kinds(self) -> None:
        fix = "Fix: choose another shared.model"
        if self.model_config.quantization:
            kind = "is quantized, expected a model without quantization. vLLM converts such weights when it loads them"
        elif any(isinstance(module, MLAAttention) for module in self.model.modules()):
            kind = (
                "uses multi-head latent attention (DeepSeek-V2, V3). With vLLM's CPU build, its logprobs differ from "
                "those of transformers before any update. On GPUs it has not been tried"
            )
        elif self._has_experts and self.vllm_config.lora_config:
            kind = "is a mixture of experts, which cannot have adapters"
            fix = "Fix: leave out trainer.lora and generator.vllm.enable_lora"
        elif self._has_experts and self.parallel_config.enable_eplb:
            kind = "is a mixture of experts whose experts move between devices, so a switch would not find them"
            fix = "Fix: leave out generator.vllm.enable_eplb"
        else:
            return
        raise ValueError(f"{self.model_config.model!r} {kind}. {fix}")

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

    def _rehearse(self, init_info: VolumeInitInfo) -> None:
        """Test that a switch reaches all parameters, and that loading the weights again restores all bytes.

        Raises:
            ValueError: Either is not the case. The message names a parameter.
        """

        def process() -> None:
            if not self._has_experts:  # a layerwise reload has derived all tensors already
                process_weights_after_loading(self.model, self.model_config, self.device)

        with set_current_vllm_config(self.vllm_config):
            problem = rehearse(
                self.model,
                spoil=lambda: self._load(_nan(init_info.table)),
                process=process,
                load=lambda: self._load(self._source(init_info.shards)),
            )
        if problem:
            raise ValueError(
                f"the weights of {self.model_config.model!r} cannot be switched while it is loaded: {problem}. Fix: "
                "choose a shared.model of another architecture (docs/reference/architectures.md)"
            )

    def _source(self, shards: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the tensors of `shards`, or those of the model's own files, in any format, if there are none."""
        if shards:
            return _tensors(shards)
        config = self.vllm_config.load_config
        loader = get_model_loader(config)
        if not hasattr(loader, "get_all_weights"):
            raise ValueError(
                f"generator.vllm.load_format is {config.load_format!r}, with which vLLM cannot load the weights of "
                f"{self.model_config.model!r} again, as after a switch that fails; expected safetensors files. Fix: "
                "leave out generator.vllm.load_format, or choose a shared.model with safetensors files"
            )
        base: Iterable[tuple[str, torch.Tensor]] = loader.get_all_weights(self.model_config, self.model)
        return base

    def start_weight_update(self) -> None:
        """Do nothing: `receive_weights` does everything."""

    def receive_weights(self, update_info: VolumeUpdateInfo) -> None:
        """Copy all shards into the model.

        Raises:
            ValueError: The shards do not contain all parameters of the model.
        """
        with set_current_vllm_config(self.vllm_config):
            self._load(self._source(update_info.shards))

    @torch.no_grad()
    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._has_experts:
            loaded = self._load_layerwise(tensors)
        else:
            loaded = self.model.load_weights(tensors)
            _refresh_attention(self.model, self.model_config.dtype)
        if missing := _not_in(loaded, self.model):
            raise ValueError(
                f"{self.model_config.model!r} has {len(missing)} parameters that these weights do not reach, such as "
                f"{min(missing)}; expected weights for all of them"
            )

    def _load_layerwise(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        with _restored_after_an_error(self.model):
            self._before_layerwise()
            initialize_layerwise_reload(self.model)
            loaded: set[str] = self.model.load_weights(tensors)
            self._check_complete()
            finalize_layerwise_reload(self.model, self.model_config)
        return loaded

    def _check_complete(self) -> None:
        """Refuse tensors that do not fill the same layers as the first load did.

        vLLM would fill the rest of a layer with whatever is in memory. It does not know which layers have elements that
        no tensor fills, such as the rows that pad a vocabulary.
        """
        filled = _filled(self.model)
        if self._filled is None:
            self._filled = filled
        if different := sorted({name for name, _ in filled.items() ^ self._filled.items()}):
            name = different[0]
            raise ValueError(
                f"these tensors fill {filled.get(name, 'all')} elements of {name}, expected "
                f"{self._filled.get(name, 'all')} as in the first load of {self.model_config.model!r}"
            )

    def _before_layerwise(self) -> None:
        """Prepare the layers for a layerwise reload."""

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` has finished the update."""

    def shutdown(self) -> None:
        """Do nothing: there is nothing to release."""


class RepackingVolumeWeightEngine(VolumeWeightEngine):
    """For devices where vLLM packs the weights of experts when it creates their kernel, and never again."""

    def _before_layerwise(self) -> None:
        for module in self.model.modules():
            if _kernel(module) is not None:
                module.quant_method.moe_kernel = None


def _filled(model: nn.Module) -> dict[str, int]:
    """Return layer → number of elements that this load fills so far, for layers that have more.

    Layers that share all parameters count as the first of them: a file may have tied embeddings once or twice.
    """
    filled: dict[str, int] = {}
    names: dict[tuple[int, ...], str] = {}
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        parameters = info.kernel_tensors[0] if info.kernel_tensors else module._parameters
        first = names.setdefault(tuple(map(id, parameters.values())), name)
        if info.can_load() and info.load_numel:
            filled[first] = max(info.load_numel, filled.get(first, 0))
    return filled


def _kernel(module: nn.Module) -> Any:
    return getattr(getattr(module, "quant_method", None), "moe_kernel", None)


@contextmanager
def _restored_after_an_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, end the layerwise reload in it, so that another load can begin.

    vLLM's own end (`finalize_layerwise_reload`) is not enough: a layer whose conversion failed stays without data. And
    without any end, the tensors that vLLM has collected become a part of the next load. The tensors of the model are
    put back, but their content may belong to two versions.
    """
    kept: list[tuple[Any, ...]] = [
        (module, dict(module._parameters), dict(module._buffers), _kernel(module)) for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, parameters, buffers, kernel in kept:
            get_layerwise_info(module).reset()
            for tensor in filter(_is_collecting, (*parameters.values(), *buffers.values())):
                tensor.weight_loader = tensor.weight_loader.__wrapped__
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            if kernel is not None:
                module.quant_method.moe_kernel = kernel
        raise


def _is_collecting(tensor: torch.Tensor | None) -> bool:
    """Whether the tensor's loader is one of a layerwise reload, which collects instead of loading."""
    return getattr(getattr(tensor, "weight_loader", None), "__name__", "") == "online_process_loader"


def _refresh_attention(model: nn.Module, dtype: torch.dtype) -> None:
    """Let vLLM's kernels for attention copy again what they keep in another type, such as the sinks on Blackwell."""
    for module in model.modules():
        if process := getattr(getattr(module, "impl", None), "process_weights_after_loading", None):
            process(dtype)


def _not_in(loaded: set[str], model: nn.Module) -> list[str]:
    """Return a name of each parameter that is not in `loaded`. Modules may share a parameter, under several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [min(of_one) for of_one in names.values() if not loaded & set(of_one)]


def _nan(table: Mapping[str, list[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a version whose elements are all NaN. It takes no memory."""
    for name, shape in table.items():
        yield name, torch.tensor(torch.nan).expand(shape)


def _tensors(shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in shards:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)
