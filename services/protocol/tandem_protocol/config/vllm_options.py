"""Options of vLLM that a project may not set: Tandem sets them itself, or they would make the two services disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sections import ConfigError

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
    "weight_transfer_config": (
        "Tandem uses it to load new weights into the engine. Fix: leave it out. `python -m tandem_trainer.trl` runs a "
        "TRL script without NCCL"
    ),
    "worker_extension_cls": "Tandem uses it to load new weights into all workers",
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
