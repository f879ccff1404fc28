"""LoRA: add an adapter to a model, disable it for the reference policy, and save it as peft and vLLM expect it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tandem_protocol.config.learning import LoraConfig
from tandem_rollout.errors import UserError

from .safetensors_file import write_files
from .shards import gather, on_meta

ADAPTER_FILE = "adapter_model.safetensors"
NAME = "default"
"""peft's name for our only adapter. It is a part of parameter names, but not of the names in files."""


def add_adapter(model: PreTrainedModel, config: LoraConfig, base: str, revision: str | None = None) -> None:
    """Freeze `model`, in place, and add an adapter that has no effect yet.

    Args:
        base: name of the model, for `adapter_config.json`.

    Raises:
        UserError: the model lacks one of `target_modules`, or one of them cannot be served as an adapter.

    Source: LoRA, arXiv:2106.09685.
    """
    is_all_linear = config.target_modules == "all-linear"
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft computes with any number
        target_modules="all-linear" if is_all_linear else list(config.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    try:
        model.add_adapter(settings, NAME)
    except ValueError as error:
        raise UserError(f"trainer.lora.target_modules: {str(error).rstrip('.')}. Fix: {_advice(model)}") from error
    _check_layers(model, () if is_all_linear else config.target_modules)


def adapted_head(model: PreTrainedModel) -> str | None:
    """Name of the output embedding, such as `lm_head`, if the adapter changes it; else None."""
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        return None
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(head)]


def _check_layers(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse layers whose adapter the generator would not serve as it was trained."""
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    if lacking := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in adapted)]:
        raise UserError(
            f"trainer.lora.target_modules names {', '.join(lacking)}, which {type(model).__name__} does not have. Fix: "
            f"{_advice(model)}"
        )
    bases = {name: _base(layer) for name, layer in adapted.items()}
    unsupported = [f"{name} ({type(base).__name__})" for name, base in bases.items() if not _is_linear(base)]
    if unsupported:
        raise UserError(
            f"trainer.lora.target_modules includes {', '.join(unsupported[:3])}, expected linear layers only, because "
            f"the generator cannot serve adapters of other layers. Fix: {_advice(model)}"
        )
    head = adapted_head(model)
    if head and _base(adapted[head]).weight is model.get_input_embeddings().weight:
        raise UserError(
            f"trainer.lora.target_modules includes {head}, which shares its weights with the input embeddings "
            "(tie_word_embeddings). Merging the adapter would change both. Fix: leave it out."
        )


def _base(layer: BaseTunerLayer) -> nn.Module:
    base = layer.get_base_layer()
    return _base(base) if isinstance(base, BaseTunerLayer) else base


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | Conv1D)


def _advice(model: PreTrainedModel) -> str:
    """List the layers that `target_modules` may name."""
    names = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if _is_linear(module) and ".lora_" not in name and "." in name.removesuffix(".base_layer")
    }
    return f"name layers from this list: {', '.join(sorted(names))}."


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapter of `model` within the block."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # `enable_adapters(False)` would also freeze the adapter, but DDP and FSDP wait for its gradients.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_table(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors under their names in its file. They have a dtype and a shape, but no data."""
    return {file_name(name): tensor.to(dtype) for name, tensor in on_meta(_adapter(model)).items()}


def adapter_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapter's complete tensors in the order of `adapter_table`. Every rank iterates at the same time."""
    for name, tensor in _adapter(model).items():
        yield file_name(name), gather(tensor.to(dtype))


def write_adapter(model: PreTrainedModel, directory: Path, dtype: torch.dtype, *, is_main: bool) -> dict[str, str]:
    """Write the adapter as peft does. Every rank calls it at the same time, and the main process writes.

    Returns:
        File name → digest; empty on ranks that write nothing.
    """
    tensors = adapter_tensors(model, dtype)
    try:
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
            save_adapter_config(model, directory)
        files = {ADAPTER_FILE: adapter_table(model, dtype)} if is_main else {}
        return write_files(directory, files, tensors)
    finally:
        for _ in tensors:  # gathering needs all ranks, even if the disk of one is full
            pass


def save_adapter_config(model: PreTrainedModel, directory: Path) -> None:
    """Write `adapter_config.json` as peft does."""
    model.peft_config[NAME].save_pretrained(directory)


def load_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Load into `model` the adapter that `write_adapter` wrote."""
    saved = load_file(directory / ADAPTER_FILE)
    state = {name: saved[file_name(name)] for name in _adapter(model)}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def file_name(parameter: str) -> str:
    """Name in the adapter's file of a parameter such as `…q_proj.lora_A.default.weight`."""
    return f"base_model.model.{parameter.replace(f'.{NAME}.', '.')}"


def _adapter(model: PreTrainedModel) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
