"""Factors that multiply the objective of GRPO's losses, and the KL term that is added to it.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last,
N tokens in the loss. A 1 in place of T means one value per row.

What a paper defines per response is computed per row here, over its sampled tokens. So a trajectory with several
sequences has several ratios. Each of them compares two policies in the context that was really sampled from, and none
depends on how the sequences are split into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_protocol.config.learning import GrpoConfig

from .base import StepTotals
from .tokens import Tokens, required


def policy_ratio(tokens: Tokens, options: GrpoConfig) -> Tensor:
    """Ratio of the policy to the old policy: per token [B, T], or the geometric mean of each row [B, 1].

    Source: `sequence` is GSPO, arXiv:2507.18071 eq. 7.
    """
    log_ratio_BT = tokens.log_ratio_BT
    return (log_ratio_BT if options.level == "token" else tokens.row_mean(log_ratio_BT)).exp()


def sampler_correction(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """Ratio of the old policy to the sampler, clipped, or set to 0 outside the bounds.

    It is per token [B, T], or the product over each row [B, 1]. It is 1 for a token without a sampler's logprob.

    Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl; masked as TRL 1.16 has it.
    """
    if options.importance_sampling == "none":
        return None
    sampler_logprobs_BT = required(tokens.sampler_logprobs_BT, "sampler_logprobs_BT", "importance_sampling")
    level, _, bound = options.importance_sampling.partition("_")
    log_ratio = ((tokens.old_logprobs_BT - sampler_logprobs_BT) * tokens.mask_BT).nan_to_num(nan=0.0)
    ratio = (log_ratio if level == "token" else log_ratio.sum(1, keepdim=True)).exp()
    low = 0.0 if options.clip_min is None else options.clip_min
    high = float("inf") if options.clip_max is None else options.clip_max
    if bound == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def off_policy_mask(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """False for tokens with a negative advantage in rows that have drifted too far from their sampler.

    A row's drift is the mean over its tokens of the log ratio of sampler to policy.

    Source: DeepSeek-V3.2, arXiv:2512.02556 eq. 9.
    """
    if options.off_policy_mask is None:
        return None
    sampled_BT = tokens.old_logprobs_BT if tokens.sampler_logprobs_BT is None else tokens.sampler_logprobs_BT
    drift_B1 = tokens.row_mean((sampled_BT - tokens.logprobs_BT.detach()).nan_to_num(nan=0.0))
    return (tokens.advantages_BT >= 0) | (drift_B1 <= options.off_policy_mask)


def top_entropy_mask(tokens: Tokens, totals: StepTotals, options: GrpoConfig) -> Tensor | None:
    """True for the fraction `top_entropy_quantile` of tokens at which the policy has the highest entropy.

    Source: Beyond the 80/20 Rule, arXiv:2506.01939 §5.
    """
    if options.top_entropy_quantile == 1:
        return None
    entropy_BT = required(tokens.entropy_BT, "entropy_BT", "top_entropy_quantile")
    threshold = totals.entropy_threshold
    if threshold is None:
        threshold = entropy_quantile(entropy_BT[tokens.mask_BT.bool()], 1 - options.top_entropy_quantile)
    return entropy_BT * tokens.mask_BT >= threshold


def entropy_quantile(entropies_N: Tensor, quantile: float) -> Tensor:
    """The quantile as a scalar tensor, in float32 as in TRL. Without any tokens it is +inf, so no token reaches it."""
    if not entropies_N.numel():
        return entropies_N.new_full((), float("inf"))
    return torch.quantile(entropies_N.float(), quantile)


def reference_kl(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """Estimate KL(policy ‖ reference). With `bias_correction_kl`, its gradient is unbiased off-policy too.

    Source: DeepSeek-V3.2, arXiv:2512.02556 eq. 7.
    """
    if options.beta == 0:
        return None
    kl_BT = k3(required(tokens.ref_logprobs_BT, "ref_logprobs_BT", "beta"), tokens.logprobs_BT)
    return kl_BT * policy_ratio(tokens, options) if options.bias_correction_kl else kl_BT


def k3(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """Estimate KL(denominator ‖ numerator) per token, for samples of the denominator. Never negative.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = numerator_logprobs - denominator_logprobs
    return log_ratio.exp() - log_ratio - 1
