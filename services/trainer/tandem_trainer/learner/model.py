"""Load a model for training: float32, not quantized, and with a deterministic forward pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tandem_protocol.config import SharedConfig
from tandem_protocol.problems import one_line
from tandem_protocol.quantization import quantization_problem
from tandem_rollout.errors import UserError

from .model_files import model_dir

_DROPOUT = re.compile(r"drop")
"""Matches the names of settings that are dropout probabilities, such as `attn_pdrop` and `layerdrop`."""
_OF_QUANTIZED = re.compile(r"(weight|input)_scale(_inv)?$|\.(qweight|qzeros|scales|absmax|quant_map|SCB)$")
"""Matches the names of tensors that only quantized checkpoints have."""


def load_model(source: str | Path, shared: SharedConfig, *, without_weights: bool = False) -> PreTrainedModel:
    """Load a model in float32 and as the generator runs it: without dropout and in evaluation mode.

    Evaluation mode computes the same gradients. Training mode would also enable noise that no setting disables, for
    example in the routers of some mixtures of experts.

    Args:
        without_weights: create parameters that have a shape but no data.

    Raises:
        UserError: the model does not exist, it is quantized, or its weights do not fit its configuration.
    """
    options = {"revision": shared.revision, "trust_remote_code": shared.trust_remote_code}
    try:
        if problem := quantization_problem(str(source), model_dir(source, shared.revision)):
            raise UserError(problem)
        config = AutoConfig.from_pretrained(source, **options)
        _remove_dropout(config)
        if without_weights:
            model = _without_weights(config, shared)
        else:
            with _no_report():
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # _check_weights reports them
                    **options,
                )
            _check_weights(model, loaded["missing_keys"], loaded["unexpected_keys"], loaded["mismatched_keys"])
    except UserError:
        raise
    except Exception as error:  # the model's own code may raise anything
        raise UserError(
            f"shared.model {str(source)!r} cannot be loaded: {one_line(error)}. Expected a directory with a Hugging "
            "Face model (relative to the project's folder) or a model id of the hub."
        ) from error
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module.__dict__)
    # Tensors are published under the names that the generator derives from the configuration. Without this line,
    # transformers would save them under the names that this checkpoint used.
    model._weight_conversions = None
    return model.eval()


def _without_weights(config: PreTrainedConfig, shared: SharedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=shared.trust_remote_code, dtype=torch.float32
        )
    model.tie_weights()  # because init_empty_weights has untied them
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Silence transformers' table of weights that do not fit. `_check_weights` raises an error for them instead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_weights(
    model: PreTrainedModel,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Refuse weights that do not fit the model. transformers only warns of them.

    Raises:
        UserError: weights are missing, have another shape, are quantized, or are not tied as the configuration says.
    """
    name = type(model).__name__
    if mismatched:
        first = [f"{key} got {tuple(got)}, expected {tuple(expected)}" for key, got, expected in sorted(mismatched)[:3]]
        raise UserError(
            f"{len(mismatched)} weights of shared.model do not have the shapes of its config.json: {'; '.join(first)}. "
            "Fix: take config.json and weights from the same model."
        )
    if scales := [key for key in unexpected if _OF_QUANTIZED.search(key)]:
        raise UserError(
            f"shared.model holds {min(scales)}, so its weights are quantized, although its config.json does not say "
            "so. Fix: choose the model that was quantized."
        )
    if lacking := sorted({parameter for parameter, _ in model.named_parameters()}.intersection(missing)):
        raise UserError(
            f"shared.model lacks {len(lacking)} weights of {name}, such as {', '.join(lacking[:3])}, which would "
            "start as random numbers. Fix: choose a checkpoint of the complete causal language model."
        )
    if untied := model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys():
        raise UserError(
            f"config.json of shared.model ties the embeddings of {name}, but the checkpoint holds a different "
            f"{min(untied)}. The generator would use the embeddings instead. Fix: set tie_word_embeddings to false in "
            "config.json."
        )


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: the backward pass computes the activations of the layers again."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # layers checkpoint only in training mode; modules within them stay in evaluation


def _remove_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability to 0, in place, in nested configurations too."""
    for settings in _mappings(config.__dict__):
        _zero(settings)


def _mappings(settings: MutableMapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    """Yield `settings` and everything nested in it: dictionaries, configurations, and lists of them."""
    yield settings
    for value in list(settings.values()):
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, PreTrainedConfig):
                yield from _mappings(part.__dict__)
            elif isinstance(part, dict):
                yield from _mappings(part)


def _zero(settings: MutableMapping[str, Any]) -> None:
    """Set dropout probabilities to 0. Flags (`drop_last`), counts and modules with such names stay as they are."""
    for name, value in settings.items():
        if isinstance(name, str) and _DROPOUT.search(name) and isinstance(value, float | int) and 0 < value < 1:
            settings[name] = 0.0
