"""Detect quantized models. Their weights can be neither trained nor switched, so both services refuse them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""File that a quantization tool writes next to config.json → its method."""


def quantization_problem(model: str, model_dir: Path) -> str | None:
    """Return why the model in `model_dir` cannot be used. None if it is not quantized.

    Args:
        model: The value of `shared.model`, for the message.
        model_dir: Directory with the model's `config.json`.
    """
    method = None
    with suppress(OSError, ValueError, AttributeError):  # a damaged config is reported when the model is loaded
        method = _method(json.loads((model_dir / "config.json").read_text()))
    method = method or next((name for file, name in _FILES.items() if (model_dir / file).is_file()), None)
    if method is None:
        return None
    return (
        f"shared.model {model!r} is quantized ({method}), expected a model in float32, bfloat16 or float16: quantized "
        "weights cannot be trained. Fix: choose the model that it was made from. If its weights are not quantized, "
        "remove quantization_config from its config.json."
    )


def _method(config: Mapping[str, Any]) -> str | None:
    """Return the quantization method of the model or of a part of it, such as `gptq, 4 bits`."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if (settings := part.get(key)) is not None:
                method = settings.get("quant_method") or next(
                    (k for k in settings if k.startswith("load_in_")), "unknown"
                )
                return f"{method}, {settings['bits']} bits" if "bits" in settings else str(method)
    return None
