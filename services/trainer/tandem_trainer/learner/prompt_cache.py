"""Compute prompts once for all rows that begin with them.

The model computes the prompts and keeps their keys and values in a cache, as it does to generate text. Then it computes
only the rest of each row, whose attention reads the cache. Gradients flow back through the keys and values.

Rows with the same prompts may be in several micro-batches, each with a backward pass of its own. The gradients of all
but the last are collected at the keys and values. The backward pass of the last micro-batch adds them to its own, and
goes on through the prompts. So activations are in memory for the prompts and for one micro-batch.

Tensor names end in their shape: P prompts, B rows, L tokens of a prompt, H hidden size.
"""

from __future__ import annotations

from copy import copy

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .heads import body


class PromptCache:
    """What the model computes once for P prompts of the same length."""

    def __init__(self, model: PreTrainedModel, token_ids_PL: Tensor) -> None:
        """
        Raises:
            TypeError: the model keeps something else than keys and values, such as the state of a recurrent layer.
        """
        self._cache = DynamicCache(config=model.config)
        hidden_PLH = body(model)(input_ids=token_ids_PL, past_key_values=self._cache, use_cache=True).last_hidden_state
        for layer in self._cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise TypeError(f"got a cache with a {type(layer).__name__}, expected keys and values only")
        self._last_P1H = _Collecting(hidden_PLH[:, -1:])
        self._keys = [_Collecting(layer.keys) for layer in self._cache.layers]
        self._values = [_Collecting(layer.values) for layer in self._cache.layers]

    def of_rows(self, prompt_B: Tensor, *, is_last: bool) -> tuple[Tensor, DynamicCache]:
        """Return, for each row, the hidden state of its prompt's last token [B, 1, H], and a cache with its prompt.

        Args:
            prompt_B: number of the row's prompt.
            is_last: no more rows follow. The backward pass of these rows goes on through the prompts.
        """
        cache = copy(self._cache)
        cache.layers = []
        for layer, keys, values in zip(self._cache.layers, self._keys, self._values, strict=True):
            of_rows = copy(layer)
            of_rows.keys, of_rows.values = keys.of_rows(prompt_B, is_last), values.of_rows(prompt_B, is_last)
            cache.layers.append(of_rows)
        return self._last_P1H.of_rows(prompt_B, is_last), cache


class _Collecting:
    """A tensor of P prompts, which collects the gradients of several backward passes."""

    def __init__(self, of_prompts: Tensor) -> None:
        self._of_prompts = of_prompts
        self._detached: Tensor | None = None

    def of_rows(self, prompt_B: Tensor, is_last: bool) -> Tensor:
        if is_last or not self._of_prompts.requires_grad:
            return self._joined().index_select(0, prompt_B)
        if self._detached is None:  # backward passes end at this copy, and leave their gradients in it
            self._detached = self._of_prompts.detach().requires_grad_()
        return self._detached.index_select(0, prompt_B)

    def _joined(self) -> Tensor:
        """The tensor with its history. The backward pass adds the gradients that were left before."""
        if (detached := self._detached) is not None:
            self._of_prompts.register_hook(lambda grad: grad + detached.grad)  # type: ignore[no-untyped-call]  # torch's
        return self._of_prompts
