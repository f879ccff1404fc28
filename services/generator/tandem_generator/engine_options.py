"""Options of `vllm serve`: how `generator.vllm` becomes words for it, and which options stay Tandem's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem_protocol.config import ConfigError

_KEYS = {
    **{name: f"shared.{name}" for name in ("model", "revision", "trust_remote_code")},
    **{
        name: f"generator.{name}"
        for name in (
            "host",
            "port",
            "tensor_parallel_size",
            "data_parallel_size",
            "gpu_memory_utilization",
            "dtype",
            "max_model_len",
            "enable_prefix_caching",
            "enforce_eager",
        )
    },
    "shutdown_timeout": "generator.shutdown_timeout_s",
    "uds": "generator.host and generator.port",
}
"""Options of vLLM that are keys of the configuration → the key."""

_OTHER_MODEL = "it changes the model or its tokens on the generator's side alone, and the trainer would not know"
_OTHER_SAMPLES = "it changes what is sampled, which the trainer's probabilities would not show"
_REASONS = {
    "api_server_count": "the policy's state lives in one server process",
    "config": "it brings options from another file. Put them under generator.vllm",
    "grpc": "trainers speak HTTP",
    "logprobs_mode": "the trainer needs the logprobs of the distribution that is really sampled from",
    "middleware": "it is where Tandem checks the bearer token",
    "weight_transfer_config": "it is how new weights reach the engine",
    "hf_overrides": f"{_OTHER_MODEL}. Change config.json of shared.model",
    "hf_config_path": f"{_OTHER_MODEL}. Change config.json of shared.model",
    "model_class_overrides": _OTHER_MODEL,
    "tokenizer": f"{_OTHER_MODEL}. Put the tokenizer into the folder of shared.model",
    "tokenizer_revision": f"{_OTHER_MODEL}. Set shared.revision",
    "code_revision": f"{_OTHER_MODEL}. Set shared.revision",
    "lora_target_modules": "vLLM would ignore the adapter on all other layers. Set trainer.lora.target_modules",
    "logits_processors": _OTHER_SAMPLES,
    "watermark_config": _OTHER_SAMPLES,
    "override_generation_config": "requests say how to sample. Set trainer.rollout",
}
"""Options of vLLM that nobody may set, and why."""

_ONLY = {"generation_config": ("auto", "vllm"), "runner": ("auto", "generate"), "convert": ("auto", "none")}
"""Options of which only some values leave the model what it is."""


def as_words(options: Mapping[str, Any]) -> list[str]:
    """`{max_num_seqs: 64, foo: true, bar: false, baz: [1, 2]}` → `--max-num-seqs 64 --foo --no-bar --baz 1 2`.

    Mappings, and lists inside of lists, become JSON.

    Raises:
        ConfigError: an empty list.
    """
    words: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            words.append(f"--no-{option[2:]}")
        elif value is True:
            words.append(option)
        elif value == []:
            raise ConfigError(f"generator.vllm.{name}: got an empty list; expected items. Fix: leave the key out.")
        elif value is not None:
            words += [option, *(_word(item) for item in (value if isinstance(value, list) else [value]))]
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def names_of(words: Iterable[str]) -> list[str]:
    """The options that are written out: `--Max-num-seqs=1`, `--no-enforce-eager`, `--a.b` → names as vLLM has them."""
    options = [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")]
    return [option.replace("-", "_").removeprefix("no_") for option in options]


def refuse_owned(options: Mapping[str, Any] | Sequence[str]) -> None:
    """See that options which Tandem sets itself, or which would part sampler and trainer, are left alone.

    Args:
        options: their names as vLLM has them, with their values where they are known.

    Raises:
        ConfigError: names the first one, with the key to use in its place or the reason.
    """
    values = options if isinstance(options, Mapping) else dict.fromkeys(options)
    for name, value in values.items():
        if name == "model_tag":  # vLLM's name for a word that belongs to no option
            raise ConfigError(f"got the word {value!r} on the command line; expected --OPTION VALUE")
        if name in _KEYS:
            raise ConfigError(f"got the option {name} for vLLM; expected it as a key. Fix: set {_KEYS[name]}.")
        if name in _REASONS:
            raise ConfigError(f"got the option {name} for vLLM; expected it left out: {_REASONS[name]}.")
        if name in _ONLY and value is not None and value not in _ONLY[name]:
            allowed = " or ".join(_ONLY[name])
            raise ConfigError(f"got the option {name} {value!r} for vLLM; expected {allowed}: {_OTHER_MODEL}.")
    speculation = values.get("speculative_config")
    if isinstance(speculation, Mapping) and speculation.get("rejection_sample_method", "standard") == "synthetic":
        raise ConfigError(
            "got speculative_config with rejection_sample_method synthetic for vLLM; expected standard or block: "
            f"{_OTHER_SAMPLES}."
        )
