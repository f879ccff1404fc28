"""Convert `generator.vllm` to arguments of `vllm serve`, and refuse options that Tandem must set itself."""

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
"""vLLM option → the configuration key that sets it."""

_OTHER_MODEL = "it would change the model or its tokens in the generator, but not in the trainer"
_OTHER_SAMPLES = "it would change what is sampled, but not the trainer's probabilities"
_REASONS = {
    "api_server_count": "the served version is kept in one server process",
    "config": "it reads options from another file. Fix: put them under generator.vllm",
    "grpc": "trainers use HTTP",
    "logprobs_mode": "the trainer needs the logprobs of the distribution that is sampled from",
    "middleware": "Tandem uses it to check the bearer token",
    "weight_transfer_config": "Tandem uses it to load new weights into the engine",
    "hf_overrides": f"{_OTHER_MODEL}. Fix: change config.json of shared.model",
    "hf_config_path": f"{_OTHER_MODEL}. Fix: change config.json of shared.model",
    "model_class_overrides": _OTHER_MODEL,
    "tokenizer": f"{_OTHER_MODEL}. Fix: put the tokenizer into the directory of shared.model",
    "tokenizer_revision": f"{_OTHER_MODEL}. Fix: set shared.revision",
    "code_revision": f"{_OTHER_MODEL}. Fix: set shared.revision",
    "lora_target_modules": "vLLM would ignore the adapter on all other layers. Fix: set trainer.lora.target_modules",
    "logits_processors": _OTHER_SAMPLES,
    "watermark_config": _OTHER_SAMPLES,
    "override_generation_config": "each request sets its own sampling parameters. Fix: set trainer.rollout",
}
"""vLLM option that users may not set → the reason."""

_ONLY = {"generation_config": ("auto", "vllm"), "runner": ("auto", "generate"), "convert": ("auto", "none")}
"""vLLM option → the values that do not change the model. Other values are refused."""


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Convert options to words for vLLM's command line.

    `{max_num_seqs: 64, foo: true, bar: false, baz: [1, 2]}` gives `--max-num-seqs 64 --foo --no-bar --baz 1 2`.
    Mappings, and lists inside lists, become JSON. Options with the value None are left out.

    Raises:
        ConfigError: An option has an empty list.
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
    """Return vLLM's names of the long options: `--max-num-seqs=1`, `--no-enforce-eager` and `--a.b` are options."""
    options = [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")]
    return [option.replace("-", "_").removeprefix("no_") for option in options]


def refuse_owned(options: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuse options that Tandem sets itself, and options that would make generator and trainer disagree.

    Args:
        options: vLLM's names of the options, with their values if they are known.

    Raises:
        ConfigError: An option is refused. The message names the first one, and the key to use instead or the reason.
    """
    values = options if isinstance(options, Mapping) else dict.fromkeys(options)
    for name, value in values.items():
        if name == "model_tag":  # vLLM's name for a word without an option
            raise ConfigError(f"got the word {value!r} on the command line; expected --OPTION VALUE")
        if name in _KEYS:
            raise ConfigError(
                f"got the option {name} for vLLM; expected the configuration key. Fix: set {_KEYS[name]}."
            )
        if name in _REASONS:
            raise ConfigError(f"got the option {name} for vLLM; expected no such option: {_REASONS[name]}.")
        if name in _ONLY and value is not None and value not in _ONLY[name]:
            allowed = " or ".join(_ONLY[name])
            raise ConfigError(f"got the option {name} {value!r} for vLLM; expected {allowed}: {_OTHER_MODEL}.")
    speculation = values.get("speculative_config")
    if isinstance(speculation, Mapping) and speculation.get("rejection_sample_method", "standard") == "synthetic":
        raise ConfigError(
            "got speculative_config with rejection_sample_method synthetic for vLLM; expected standard or block: "
            f"{_OTHER_SAMPLES}."
        )
