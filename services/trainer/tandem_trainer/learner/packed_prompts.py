"""Compute prompts and the rows that begin with them in one call of the model: as one long row.

    prompt 0 | prompt 1 | rest of row 0 | rest of row 1 | rest of row 2

A mask lets the rest of a row see its own prompt and itself, and its positions continue those of the prompt. So each
hidden state is what it would be in a row of its own. This needs no cache, so gradient checkpointing can compute it
again. But the attention compares all pairs of tokens, also those that the mask excludes. So it does not always pay.

Tensor names end in their shape: P prompts, L tokens of a prompt, B rows, S all tokens of a row, R its tokens behind the
prompt, N tokens of the long row, H hidden size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from tandem_protocol.problems import one_line

from ..batch import SharedPrompts
from ..micro_batches import PackedPrompts
from .heads import body

log = logging.getLogger(__name__)

NO_ROW = -1
"""Stands for the number of a row at the tokens of a prompt."""
LAYERS = {"full_attention", "sliding_attention"}
"""Layers whose attention the mask of a packed row can describe."""
SLOWNESS = 2.0
"""Time of an operation in a masked attention, relative to one in a matrix product (measured)."""
COUNTED_TOKENS = 32
"""Tokens of the shorter of two rows in which operations are counted."""
_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""Ends of the names of torch's kernels."""


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why prompts cannot be packed with their rows, or None."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == "eager":
        return "the eager attention would keep the scores of all pairs of tokens of a packed row"
    if others := {*(getattr(config, "layer_types", None) or ())} - LAYERS:
        return f"no mask of a packed row is known for layers with {', '.join(sorted(others))}"
    return None


def packed_prompts(model: PreTrainedModel) -> PackedPrompts:
    """Count the operations of two short rows, to find out what packed prompts cost.

    Only those of the attention grow faster than the number of tokens. If they cannot be counted, packing never pays.
    """
    tokens = COUNTED_TOKENS
    try:
        one, two = (_operations(model, many) for many in (tokens, 2 * tokens))
        of_pair = (two - 2 * one) / (2 * tokens**2)
        return PackedPrompts(SLOWNESS * of_pair / (one / tokens - of_pair * tokens))
    except Exception as error:  # the model's own code may raise anything
        log.warning("prompts are not packed, because their cost is unknown: %s", one_line(error))
        return PackedPrompts(float("inf"))


@torch.no_grad()
def _operations(model: PreTrainedModel, tokens: int) -> int:
    """Count the operations of a row of this many tokens, without those of the output embedding."""
    token_ids_S = torch.arange(tokens, device=model.device) % model.get_input_embeddings().num_embeddings
    kernels = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _of_attention for name in _ATTENTION}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        body(model)(input_ids=token_ids_S[None], use_cache=False)
    return int(counter.get_total_flops())


def _of_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of an attention with these shapes. torch's own counts know neither grouped queries nor CPUs."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def packed_hidden(model: PreTrainedModel, token_ids_BS: Tensor, shared: SharedPrompts) -> Tensor:
    """Return the hidden states of the rows from the last token of their prompts on: [B, 1 + R, H]."""
    number_of_prompts, length = shared.token_ids_PL.shape
    rest_BR = token_ids_BS[:, length:]
    device, (rows, rest) = rest_BR.device, rest_BR.shape
    of_prompts, of_rows = (torch.arange(many, device=device) for many in (number_of_prompts, rows))
    prompt_N = torch.cat([of_prompts.repeat_interleave(length), shared.prompt_B.repeat_interleave(rest)])
    no_row = torch.full_like(prompt_N[: number_of_prompts * length], NO_ROW)
    row_N = torch.cat([no_row, of_rows.repeat_interleave(rest)])
    positions = torch.arange(length + rest, device=device)
    position_N = torch.cat([positions[:length].repeat(number_of_prompts), positions[length:].repeat(rows)])
    output = body(model)(
        input_ids=torch.cat([shared.token_ids_PL.flatten(), rest_BR.flatten()])[None],
        position_ids=position_N[None],
        attention_mask=_masks(model, prompt_N, row_N, position_N),
        use_cache=False,
    )
    hidden_NH = output.last_hidden_state.squeeze(0)
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
    window = getattr(config, "sliding_window", None)
    first_N = position_N - (window or 0)

    # These build a tensor of N × N, so they compare values instead of computing with them.
    def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = (row_N[key] == row_N[query]) | (row_N[key] == NO_ROW)
        return (key <= query) & (prompt_N[key] == prompt_N[query]) & is_own

    def is_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (position_N[key] > first_N[query]) & is_visible(batch, head, query, key)

    shape = torch.empty(1, len(position_N), 0, dtype=model.dtype, device=position_N.device)
    added = is_near if window else None
    return create_masks_for_generate(
        config, shape, None, None, or_mask_function=added, and_mask_function=is_visible
    )  # fmt: skip
