"""Compute prompts and the rows that begin with them in one call of the model: as one long row.

    prompt 0 | prompt 1 | rest of row 0 | rest of row 1 | rest of row 2

A mask lets the rest of a row see its own prompt and itself, and its positions continue those of the prompt. So each
hidden state is what it would be in a row of its own. This needs no cache, so gradient checkpointing can compute it
again. But the attention compares all pairs of tokens, also those that the mask excludes.

Tensor names end in their shape: P prompts, L tokens of a prompt, B rows, S all tokens of a row, R its tokens behind the
prompt, N tokens of the long row, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..batch import SharedPrompts
from .heads import body

PROMPT = -1


def packed_hidden(model: PreTrainedModel, token_ids_BS: Tensor, shared: SharedPrompts) -> Tensor:
    """Return the hidden states of the rows from the last token of their prompts on: [B, 1 + R, H]."""
    number_of_prompts, length = shared.token_ids_PL.shape
    rest_BR = token_ids_BS[:, length:]
    device, (rows, rest) = rest_BR.device, rest_BR.shape
    of_prompts, of_rows = (torch.arange(many, device=device) for many in (number_of_prompts, rows))
    prompt_N = torch.cat([of_prompts.repeat_interleave(length), shared.prompt_B.repeat_interleave(rest)])
    no_row = torch.full_like(prompt_N[: number_of_prompts * length], PROMPT)
    row_N = torch.cat([no_row, of_rows.repeat_interleave(rest)])
    positions = torch.arange(length + rest, device=device)
    position_N = torch.cat([positions[:length].repeat(number_of_prompts), positions[length:].repeat(rows)])
    hidden_NH = (
        body(model)(
            input_ids=torch.cat([shared.token_ids_PL.flatten(), rest_BR.flatten()])[None],
            position_ids=position_N[None],
            attention_mask=_masks(model, prompt_N, row_N, position_N),
            use_cache=False,
        )
        .last_hidden_state.squeeze(0)
    )  # fmt: skip
    prompts_NH, rests_NH = hidden_NH.split([number_of_prompts * length, rows * rest])
    last_PH = prompts_NH.unflatten(0, (number_of_prompts, length))[:, -1]
    return torch.cat([last_PH[shared.prompt_B][:, None], rests_NH.unflatten(0, (rows, rest))], 1)


def _masks(model: PreTrainedModel, prompt_N: Tensor, row_N: Tensor, position_N: Tensor) -> Any:
    """Return what the model takes as `attention_mask`: [1, 1, N, N], or one such mask for each type of layer.

    transformers computes (its own mask or `or_mask_function`) and `and_mask_function`. Its own sliding window counts
    the tokens of the long row, where the rest of a row is further from its prompt than by position. So that mask lacks
    pairs, which `is_near` adds.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or len(position_N)

    def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = (row_N[key] == row_N[query]) | (row_N[key] == PROMPT)
        return (key <= query) & (prompt_N[key] == prompt_N[query]) & is_own

    def is_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (position_N[query] - position_N[key] < window) & is_visible(batch, head, query, key)

    shape = torch.empty(1, len(position_N), 0, dtype=model.dtype, device=position_N.device)
    return create_masks_for_generate(
        config, shape, None, None, or_mask_function=is_near, and_mask_function=is_visible
    )  # fmt: skip
