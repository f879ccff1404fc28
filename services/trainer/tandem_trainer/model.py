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

from .errors import UserError

_RANDOM = re.compile(r"drop|jitter|noise")
"""In the names of settings that make a forward pass random, such as `attn_pdrop` and `router_jitter_noise`."""


def load_model(source: str | Path, shared: SharedConfig, *, without_weights: bool = False) -> PreTrainedModel:
    """The model in float32, without dropout: the generator that its logprobs are compared with has none.

    Args:
        without_weights: its parameters have shapes only.

    Raises:
        UserError: there is no such model, or its weights are not those that its configuration describes.
    """
    options = {"revision": shared.revision, "trust_remote_code": shared.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _remove_randomness(config)
        if without_weights:
            model = _without_weights(config, shared)
        else:
            with _no_report():
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # we tell them
                    **options,
                )
            _check_weights(model, loaded["missing_keys"], loaded["mismatched_keys"])
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
    return model.train()


def _without_weights(config: PreTrainedConfig, shared: SharedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=shared.trust_remote_code, dtype=torch.float32
        )
    model.tie_weights()  # init_empty_weights has undone it
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Without the table of weights that did not fit: what is in it is an error here, told in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_weights(
    model: PreTrainedModel,
    missing: Collection[str],
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Refuse what `transformers` warns of only: weights that it has made up, or has not tied as it should."""
    name = type(model).__name__
    if mismatched:
        first = [f"{key} got {tuple(got)}, expected {tuple(want)}" for key, got, want in sorted(mismatched)[:3]]
        raise UserError(
            f"{len(mismatched)} weights of shared.model do not have the shapes of its config.json: {'; '.join(first)}. "
            "Fix: take config.json and weights from the same model."
        )
    if missing:
        raise UserError(
            f"shared.model lacks {len(missing)} weights of {name}, such as {', '.join(sorted(missing)[:3])}, which "
            "would begin as random numbers. Fix: choose a checkpoint of the whole causal language model."
        )
    if untied := model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys():
        raise UserError(
            f"config.json of shared.model ties the embeddings of {name}, but its weights hold another {min(untied)}. "
            "The generator would use the embeddings in its place. Fix: set tie_word_embeddings to false in config.json."
        )


def _remove_randomness(config: PreTrainedConfig) -> None:
    """Set every probability of dropout and every size of noise to 0, in place, in parts of the configuration too."""
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
        if isinstance(name, str) and _RANDOM.search(name) and isinstance(value, float | int) and 0 < value < 1:
            settings[name] = 0.0
