"""What a model does between its last hidden states and its logits, besides the output embedding.

Example: Gemma 2 caps its logits at ±30, Granite divides them by 8. vLLM does the same, so the trainer has to.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import UserError

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALE = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), "logit_scale"),
    "falcon_h1": "lm_head_multiplier",
}
"""`model_type` → the key of what logits are multiplied by."""


class Head(NamedTuple):
    """`logits = cap · tanh(scale · output embedding(hidden) / cap)`; a `cap` of None caps nothing."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Head:
        """What the model's configuration says. `logprobs.check` sees that it is what the model does.

        Source: `forward` of each model class in transformers.
        """
        text = config.get_text_config(decoder=True)
        cap = next((value for name in _CAPS if (value := getattr(text, name, None))), None)
        return cls(_scale(text), cap)


def _scale(config: PreTrainedConfig) -> float:
    if key := _SCALE.get(config.model_type):
        return float(getattr(config, key))
    # Granite and MiniCPM 3 divide by what HyperCLOVA X multiplies with.
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its output embedding.

    Raises:
        UserError: it cannot be told apart.
    """
    if model.base_model is model:
        raise UserError(
            f"got a {type(model).__name__}, which has no body apart from its output embedding (base_model_prefix "
            f"{model.base_model_prefix!r}), expected one. The trainer computes logits for some tokens at a time and "
            "needs the two parts. Fix: choose another model."
        )
    return model.base_model  # type: ignore[no-any-return]  # transformers ships no types here
