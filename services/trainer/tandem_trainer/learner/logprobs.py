"""Compute the logprobs of sampled tokens without keeping the logits of a complete batch.

Tensor names end in their shape: B rows, S all tokens of a row, T its tokens from the first sampled one to the last, N
sampled tokens of all rows together, C tokens of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tandem_rollout.errors import UserError

from ..batch import SharedPrompts
from ..devices import softmax_logits
from .heads import Head, body
from .packed_prompts import packed_hidden
from .prompt_cache import PromptCache

CHECKED_TOKENS = 8
"""Number of tokens in the forward passes that `check` compares."""


class TokenLogprobs(nn.Module):
    """A causal language model that returns the logprobs of given tokens instead of logits.

    It is a module because accelerate's wrappers (DDP, FSDP) call the `forward` of the module that they wrap.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, chunk_size: int, packs_prompts: bool = False
    ) -> None:
        """
        Args:
            packs_prompts: compute shared prompts in one row with the rows that begin with them, instead of in a cache.
                transformers ignores a cache if gradients are checkpointed, and a cache takes calls of the model of its
                own, of which all ranks must make equally many if parameters are sharded.
        """
        super().__init__()
        self.packs_prompts = packs_prompts
        self.model = model
        self.temperature = temperature
        self.head = Head.of(model.config)
        self._chunk_size = chunk_size
        self._prompts: dict[bool, PromptCache] = {}
        """The prompts of the current micro-batches, computed with gradients (True) or without (False)."""

    def forward(
        self, token_ids_BS: Tensor, starts_B: Tensor, sampled_mask_BT: Tensor, shared: SharedPrompts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropies of the sampled tokens: [B, T] each, 0 where `sampled_mask_BT` is False.

        T begins at position `starts_B` of the row, at least 1. If prompts are shared, the micro-batches with the same
        prompts have to follow each other, and each but the last needs its backward pass before the next one.

        To save memory, logits exist for only `chunk_size` tokens at a time. The backward pass uses the probabilities of
        the last chunk, which are kept, and computes the other chunks again.
        """
        rows_N, offsets_N = sampled_mask_BT.nonzero(as_tuple=True)  # waits for the GPU, so it comes first
        hidden_BSH = self._hidden(token_ids_BS, shared)
        positions_N = starts_B[rows_N] + offsets_N
        # The last token is the last one of both, although the hidden states may lack those of a prompt.
        missing = token_ids_BS.shape[1] - hidden_BSH.shape[1]
        hidden_NH = hidden_BSH[rows_N, positions_N - 1 - missing]
        targets_N = token_ids_BS[rows_N, positions_N]
        *recomputed, last = zip(
            torch.split(hidden_NH, self._chunk_size), torch.split(targets_N, self._chunk_size), strict=True
        )
        chunks = [
            checkpoint(self._chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in recomputed
        ]
        chunks.append(self._chunk(*last))
        logprobs_N, entropies_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        where = (rows_N, offsets_N)
        zeros_BT = logprobs_N.new_zeros(sampled_mask_BT.shape)
        return zeros_BT.index_put(where, logprobs_N), zeros_BT.index_put(where, entropies_N)

    def _hidden(self, token_ids_BS: Tensor, shared: SharedPrompts | None) -> Tensor:
        """Return the hidden states of the rows [B, S, H], or only from the last token of the shared prompts on."""
        # No attention mask is needed: padding is on the right, where a causal model cannot see it.
        model = body(self.model)
        if shared is None:
            return model(input_ids=token_ids_BS, use_cache=False).last_hidden_state  # type: ignore[no-any-return]  # calling a module returns Any
        if self.packs_prompts:
            return packed_hidden(self.model, token_ids_BS, shared)
        has_gradients = torch.is_grad_enabled()
        if shared.is_first:
            self._prompts[has_gradients] = PromptCache(self.model, shared.token_ids_PL)
        prompts = self._prompts.pop(has_gradients) if shared.is_last else self._prompts[has_gradients]
        last_B1H, cache = prompts.of_rows(shared.prompt_B, is_last=shared.is_last)
        rest_BS = token_ids_BS[:, shared.token_ids_PL.shape[1] :]
        rest_BSH = model(input_ids=rest_BS, past_key_values=cache, use_cache=True).last_hidden_state
        return torch.cat([last_B1H, rest_BSH], 1)

    def _chunk(self, hidden_CH: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = self.model.get_output_embeddings()(hidden_CH).float()
        # The model's scale of the logits is applied as a part of the temperature.
        temperature = self.temperature / self.head.scale
        cap = self.head.cap and self.head.cap / self.temperature
        logprobs_C, entropies_C = _TargetLogprobs.apply(logits_CV, targets_C, temperature, cap)  # type: ignore[no-untyped-call]  # torch's
        return logprobs_C, entropies_C


class _TargetLogprobs(torch.autograd.Function):
    """Logprobs of the target tokens, and entropies without a gradient, computed in the memory of the logits.

    The forward pass overwrites the logits with probabilities, or with logprobs if the logits are capped. The backward
    pass overwrites them again, with the logits' gradient. It can therefore run only once.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, targets_C: Tensor, temperature: float, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Divide the logits by `temperature`, soft-cap them at `cap` if it is given, and compute."""
        logprobs_C, entropies_C, sums_C = logits_CV.new_empty(3, len(logits_CV))
        for values_RV, targets_R, logprobs_R, entropies_R, sums_R in _blocks(
            logits_CV, targets_C, logprobs_C, entropies_C, sums_C
        ):
            if temperature != 1:
                values_RV.div_(temperature)
            if cap:
                values_RV.div_(cap).tanh_().mul_(cap)
            logprobs_RV = values_RV.log_softmax(-1)
            torch.gather(logprobs_RV, -1, targets_R[:, None], out=logprobs_R[:, None])
            if cap:
                torch.sub(values_RV[:, 0], logprobs_RV[:, 0], out=sums_R)
                values_RV.copy_(logprobs_RV)
                logprobs_RV.mul_(values_RV.exp())
            else:
                torch.exp(logprobs_RV, out=values_RV)
                logprobs_RV.mul_(values_RV)
            torch.sum(logprobs_RV, -1, out=entropies_R).neg_()
        ctx.save_for_backward(logits_CV, targets_C, sums_C)
        ctx.temperature = temperature
        ctx.cap = cap
        ctx.mark_non_differentiable(entropies_C)
        return logprobs_C, entropies_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        values_CV, targets_C, sums_C = ctx.saved_tensors
        # d log p(target) / d logits = onehot(target) − p, over the temperature
        grad_C1 = grad_C[:, None] / ctx.temperature
        if not ctx.cap:
            return values_CV.mul_(-grad_C1).scatter_add_(-1, targets_C[:, None], grad_C1), None, None, None
        for values_RV, targets_R, sums_R, grad_R1 in _blocks(values_CV, targets_C, sums_C, grad_C1):
            # d (cap · tanh(x / cap)) / d x = 1 − tanh², and the capped logit is logprob + log of the sum.
            slopes_RV = 1 - ((values_RV + sums_R[:, None]) / ctx.cap).square_()
            values_RV.exp_().mul_(-grad_R1).scatter_add_(-1, targets_R[:, None], grad_R1).mul_(slopes_RV)
        return values_CV, None, None, None


def _blocks(values_CV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split all tensors along their first dimension into blocks of R rows. The blocks are views."""
    rows = max(1, softmax_logits(values_CV.device) // values_CV.shape[1])
    return zip(*(torch.split(tensor, rows) for tensor in (values_CV, *others)), strict=True)


@torch.no_grad()
def check_logprobs(policy: TokenLogprobs) -> None:
    """Check, with a few tokens, that the logprobs are deterministic and agree with the model's own logits.

    Raises:
        UserError: the forward pass is random (dropout, noise), or the model changes its logits after the output
            embedding in a way that `heads.py` does not know.
    """
    model = policy.model
    token_ids_BS = torch.arange(CHECKED_TOKENS, device=model.device)[None] % len(model.get_input_embeddings().weight)
    starts_B = torch.tensor([1], device=model.device)
    sampled_mask_BT = torch.ones_like(token_ids_BS[:, 1:]).bool()
    inputs = (token_ids_BS, starts_B, sampled_mask_BT)
    ours_BT, _ = policy(*inputs)
    again_BT, _ = policy(*inputs)
    if not _equal(ours_BT, again_BT):
        raise UserError(
            f"{type(model).__name__} is random: the same tokens got the logprobs {ours_BT[0, :3].tolist()}, then "
            f"{again_BT[0, :3].tolist()}, expected equal ones. The difference begins in "
            f"{_random_module(policy, inputs)}. The generator's forward pass is not random, so the trainer would "
            "compute the logprobs of another policy. Fix: set the source of randomness (dropout, noise) to 0 in the "
            "model's config.json, or choose another model."
        )
    logits_SV = model(input_ids=token_ids_BS, use_cache=False).logits[0].float() / policy.temperature
    theirs_T = logits_SV[:-1].log_softmax(-1).gather(-1, token_ids_BS[0, 1:, None]).squeeze(-1)
    if not torch.allclose(ours_BT[0], theirs_T, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding in a way that the trainer does not "
            f"know: got the logprobs {theirs_T[:3].tolist()}, expected {ours_BT[0, :3].tolist()} (with the scale "
            f"{policy.head.scale:g} and the soft cap {policy.head.cap}). Fix: choose another model."
        )


def _random_module(policy: TokenLogprobs, inputs: tuple[Tensor, ...]) -> str:
    """Name of the innermost module whose output differs for the same inputs."""
    for one, other in zip(_observed(policy, inputs), _observed(policy, inputs), strict=False):
        if one.name != other.name or (_equal(one.inputs, other.inputs) and not _equal(one.output, other.output)):
            return one.name
    return f"{type(policy.model).__name__}.forward"


class _Call(NamedTuple):
    name: str
    inputs: Any
    output: Any


def _observed(policy: TokenLogprobs, inputs: tuple[Tensor, ...]) -> list[_Call]:
    """Record the inputs and output of each module, in the order in which the modules finish."""
    calls: list[_Call] = []

    def record(name: str) -> Any:
        return lambda _, args, kwargs, output: calls.append(_Call(name, _copied([args, kwargs]), _copied(output)))

    hooks = [
        module.register_forward_hook(record(f"{name or 'the model'} ({type(module).__name__})"), with_kwargs=True)
        for name, module in policy.model.named_modules()
    ]
    policy(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def _copied(output: Any) -> Any:
    """Copy the tensors in `output`, because the next module may change them in place."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        return [_copied(part) for part in output]
    return output.clone() if isinstance(output, Tensor) else None


def _equal(one: Any, other: Any) -> bool:
    """Compare with a tolerance for rounding: a GPU may sum in a different order each time."""
    if isinstance(one, list):
        return all(map(_equal, one, other))
    return one is None or torch.allclose(one, other, atol=1e-6, rtol=1e-4, equal_nan=True)
