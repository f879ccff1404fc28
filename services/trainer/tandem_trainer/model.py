"""Loading a model so that it is fit for training: float32, unquantized, and without randomness in its forward pass."""

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

from .errors import UserError
from .model_files import model_dir

_DROPOUT = re.compile(r"drop")
"""In the names of settings that are probabilities of dropout, such as `attn_pdrop` and `layerdrop`."""
_OF_QUANTIZED = re.compile(r"(weight|input)_scale(_inv)?$|\.(qweight|qzeros|scales|absmax|quant_map|SCB)$")
"""Names of tensors that belong to quantized weights."""


def load_model(source: str | Path, shared: SharedConfig, *, without_weights: bool = False) -> PreTrainedModel:
    """The model in float32 and as the generator runs it: without dropout and in evaluation mode.

    Gradients are the same there. Training mode would also switch on noise that no setting turns off, such as that of
    the routers of some mixtures of experts.

    Args:
        without_weights: its parameters have shapes only.

    Raises:
        UserError: there is no such model, it is quantized, or its weights are not those that its configuration
            describes.
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
                    ignore_mismatched_sizes=True,  # they are reported below
                    **options,
                )
            _check_weights(model, loaded["missing_keys"], loaded["unexpected_keys"], loaded["mismatched_keys"])
    except UserError:
        raise
    except Exception as error:  # of any kind: the model's own code may run here
        raise UserError(
            f"shared.model {str(source)!r} cannot be loaded: {one_line(error)}. Expected a directory with a Hugging "
            "Face model (relative to the project's folder) or a model id of the hub."
        ) from error
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module.__dict__)
    # Tensors are published under the names that the configuration implies, as the generator derives them, whatever
    # names the checkpoint on disk has.
    model._weight_conversions = None
    return model.eval()


def _without_weights(config: PreTrainedConfig, shared: SharedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=shared.trust_remote_code, dtype=torch.float32
        )
    model.tie_weights()  # init_empty_weights has undone it
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Without the table of weights that did not fit: what is in it is an error here, reported in one line."""
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
    """Refuse what `transformers` warns of only: weights that it has made up, not scaled, or not tied as it should."""
    name = type(model).__name__
    if mismatched:
        first = [f"{key} got {tuple(got)}, expected {tuple(want)}" for key, got, want in sorted(mismatched)[:3]]
        raise UserError(
            f"{len(mismatched)} weights of shared.model do not have the shapes of its config.json: {'; '.join(first)}. "
            "Fix: take config.json and weights from the same model."
        )
    if scales := [key for key in unexpected if _OF_QUANTIZED.search(key)]:
        raise UserError(
            f"shared.model holds {min(scales)}, so its weights are quantized, which its config.json does not say. Fix: "
            "choose the model that it was made from."
        )
    if lacking := sorted({parameter for parameter, _ in model.named_parameters()}.intersection(missing)):
        raise UserError(
            f"shared.model lacks {len(lacking)} weights of {name}, such as {', '.join(lacking[:3])}, which "
            "would begin as random numbers. Fix: choose a checkpoint of the whole causal language model."
        )
    if untied := model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys():
        raise UserError(
            f"config.json of shared.model ties the embeddings of {name}, but its weights hold another {min(untied)}. "
            "The generator would use the embeddings in its place. Fix: set tie_word_embeddings to false in config.json."
        )


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Let the layers of `model` compute activations again in the backward pass, as they do in training mode only."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # not what is within it


def _remove_dropout(config: PreTrainedConfig) -> None:
    """Set every probability of dropout to 0, in place, in parts of the configuration too."""
    for settings in _mappings(config.__dict__):
        _zero(settings)


def _mappings(settings: MutableMapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    """`settings` and the settings within it: dictionaries, configurations of parts, and lists of them."""
    yield settings
    for value in list(settings.values()):
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, PreTrainedConfig):
                yield from _mappings(part.__dict__)
            elif isinstance(part, dict):
                yield from _mappings(part)


def _zero(settings: MutableMapping[str, Any]) -> None:
    """Only numbers between 0 and 1: not a flag (`drop_last`), a count, or a module of that name."""
    for name, value in settings.items():
        if isinstance(name, str) and _DROPOUT.search(name) and isinstance(value, float | int) and 0 < value < 1:
            settings[name] = 0.0
