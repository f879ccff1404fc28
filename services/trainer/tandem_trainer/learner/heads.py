"""Scaling and capping of logits, which some models apply after the output embedding.

Example: Gemma 2 caps its logits at ±30, and Granite divides them by 8. The trainer computes logits itself, so it has
to do the same as the model and vLLM.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tandem_rollout.errors import UserError

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALE = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), "logit_scale"),
    "falcon_h1": "lm_head_multiplier",
}
"""`model_type` → the configuration key of the factor by which logits are multiplied."""


class Head(NamedTuple):
    """`logits = cap · tanh(scale · output embedding(hidden) / cap)`. Without a `cap`, only the scale applies."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Head:
        """Read scale and cap from the model's configuration. `check_logprobs` compares the result with the model.

        Source: `forward` of each model class in transformers.
        """
        text = config.get_text_config(decoder=True)
        cap = next((value for name in _CAPS if (value := getattr(text, name, None))), None)
        return cls(_scale(text), cap)


def _scale(config: PreTrainedConfig) -> float:
    if key := _SCALE.get(config.model_type):
        return float(getattr(config, key))
    # Granite and MiniCPM 3 divide by this value. HyperCLOVA X multiplies by it.
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def body(model: PreTrainedModel) -> nn.Module:
    """Return the model without its output embedding.

    Raises:
        UserError: the model does not separate the two.
    """
    if model.base_model is model:
        raise UserError(
            f"got a {type(model).__name__} with base_model_prefix {model.base_model_prefix!r}, expected a model with a "
            "separate output embedding. The trainer needs the two parts, because it computes the logits of a few "
            "tokens at a time. Fix: choose another model."
        )
    return model.base_model  # type: ignore[no-any-return]  # transformers ships no types here
