"""Positions that do not depend on what else is in a batch, and are those of the generator.

transformers chooses between two rotary encodings by the padded length of each batch: `longrope` has factors for short
and for long batches, `dynamic` scales the base of long ones. vLLM chooses once, by `max_model_len`. Its choice is made
here for the trainer, before the first update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import UserError

DEFAULT, LONGROPE, DYNAMIC = "default", "longrope", "dynamic"
OTHER_WINDOW = ("cohere2", "cohere2_moe")
"""Of these, vLLM's sliding window has one token more than that of transformers."""


class _Rope(NamedTuple):
    """The encoding of one kind of layers."""

    module: nn.Module
    layer_type: str | None
    """None: the model has one encoding."""
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
        """Keep the short or the long factors for batches of every length.

        Source: `Phi3LongRoPEScaledRotaryEmbedding` in vLLM, which knows `short_mscale` and `long_mscale` besides.
        """
        arguments = {} if self.layer_type is None else {"layer_type": self.layer_type}
        length = self.parameters["original_max_position_embeddings"] + is_long
        frequencies = self._name("inv_freq")
        device = getattr(self.module, frequencies).device
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[LONGROPE](self.config, device, seq_len=length, **arguments)
        setattr(self.module, frequencies, inv_freq)
        mscale = self.parameters.get("long_mscale" if is_long else "short_mscale")
        setattr(self.module, self._name("attention_scaling"), scaling if mscale is None else mscale)
        # transformers updates every type but this one in each forward pass.
        if self.layer_type is None:
            setattr(self.module, "rope_type", DEFAULT)  # noqa: B010 - a module's attributes have no types
        else:
            setattr(self.module, "rope_type", {**self.module.rope_type, self.layer_type: DEFAULT})  # type: ignore[dict-item]  # noqa: B010

    def _name(self, attribute: str) -> str:
        return attribute if self.layer_type is None else f"{self.layer_type}_{attribute}"


def fix_positions(model: PreTrainedModel, max_model_lens: Sequence[int]) -> int:
    """Give `model`, in place, the position encodings of generators that take `max_model_lens` tokens.

    Returns:
        The length of the longest row for which they agree.

    Raises:
        UserError: the generators differ among each other.
    """
    length = min(max_model_lens)
    for rope in _ropes(model):
        if rope.rope_type == LONGROPE:
            original = rope.parameters["original_max_position_embeddings"]
            if length <= original < max(max_model_lens):
                raise UserError(
                    f"got generators with max_model_len {', '.join(map(str, sorted(max_model_lens)))}; expected all "
                    f"above {original} or none, because {type(model).__name__} encodes positions in another way above "
                    "that length (longrope). Fix: give all of them the same generator.max_model_len."
                )
            rope.fix(is_long=length > original)
        elif rope.rope_type == DYNAMIC:
            # Neither side scales up to here; beyond, vLLM has no positions and transformers goes by the batch.
            length = min(length, rope.config.max_position_embeddings)
    config = model.config.get_text_config(decoder=True)
    return min(length, config.sliding_window) if config.model_type in OTHER_WINDOW else length


def _ropes(model: PreTrainedModel) -> Iterator[_Rope]:
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in types.items() if isinstance(types, dict) else [(None, types)]:
            if rope_type in (LONGROPE, DYNAMIC):
                yield _Rope(module, layer_type, rope_type)
