"""Make the model encode positions as the generator does, independently of the lengths in a batch.

For some models, transformers chooses between two rotary encodings by the padded length of each batch: `longrope` has
factors for short and for long batches, and `dynamic` scales the base for long ones. vLLM chooses once, by
`max_model_len`. This module applies vLLM's choice to the trainer's model before the first update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tandem_rollout.errors import UserError

DEFAULT = "default"
LONGROPE = "longrope"
DYNAMIC = "dynamic"
OTHER_WINDOW = ("cohere2", "cohere2_moe")
"""Model types whose sliding window has one token more in vLLM than in transformers."""


class _Rope(NamedTuple):
    """The rotary encoding of one layer type."""

    module: nn.Module
    layer_type: str | None
    """None if all layers share one encoding."""
    rope_type: str

    @property
    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.module.config
        return config

    @property
    def parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = self.config.rope_parameters
        return parameters if self.layer_type is None else parameters[self.layer_type]

    def fix(self, *, is_long: bool) -> None:
        """Use the long factors if `is_long`, else the short ones, for batches of every length.

        Source: `Phi3LongRoPEScaledRotaryEmbedding` in vLLM, which also reads `short_mscale` and `long_mscale`.
        """
        arguments = {} if self.layer_type is None else {"layer_type": self.layer_type}
        length = self.parameters["original_max_position_embeddings"] + is_long
        frequencies = self._name("inv_freq")
        device = getattr(self.module, frequencies).device
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[LONGROPE](self.config, device, seq_len=length, **arguments)
        setattr(self.module, frequencies, inv_freq)
        mscale = self.parameters.get("long_mscale" if is_long else "short_mscale")
        setattr(self.module, self._name("attention_scaling"), scaling if mscale is None else mscale)
        # In each forward pass, transformers recomputes the factors of every type except "default".
        if self.layer_type is None:
            setattr(self.module, "rope_type", DEFAULT)  # noqa: B010 - a module's attributes have no types
        else:
            setattr(self.module, "rope_type", {**self.module.rope_type, self.layer_type: DEFAULT})  # type: ignore[dict-item]  # noqa: B010

    def _name(self, attribute: str) -> str:
        return attribute if self.layer_type is None else f"{self.layer_type}_{attribute}"


def fix_positions(model: PreTrainedModel, max_model_lens: Sequence[int]) -> int:
    """Change `model`, in place, to encode positions as generators with these values of `max_model_len` do.

    Returns:
        The longest row, in tokens, for which trainer and generators encode positions alike.

    Raises:
        UserError: the generators encode positions differently.
    """
    length = min(max_model_lens)
    for rope in _ropes(model):
        if rope.rope_type == LONGROPE:
            original = rope.parameters["original_max_position_embeddings"]
            if length <= original < max(max_model_lens):
                raise UserError(
                    f"got generators with max_model_len {', '.join(map(str, sorted(max_model_lens)))}, expected all "
                    f"above {original} or none, because {type(model).__name__} encodes positions differently above "
                    "that length (longrope). Fix: give all of them the same generator.max_model_len."
                )
            rope.fix(is_long=length > original)
        elif rope.rope_type == DYNAMIC:
            # Up to this length neither side scales. Longer rows are scaled by transformers, but not possible in vLLM.
            length = min(length, rope.config.max_position_embeddings)
    config = model.config.get_text_config(decoder=True)
    return min(length, config.sliding_window) if config.model_type in OTHER_WINDOW else length


def _ropes(model: PreTrainedModel) -> Iterator[_Rope]:
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in types.items() if isinstance(types, dict) else [(None, types)]:
            if rope_type in (LONGROPE, DYNAMIC):
                yield _Rope(module, layer_type, rope_type)
