"""What the objective of GRPO's losses is multiplied by, and the KL that is added to it.

Tensor names end in their shape: B rows (one completion each), T completion tokens, N tokens in the loss; a 1 instead of
T where one value holds for a whole row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GrpoConfig
from .tokens import Tokens, wanted


def policy_ratio(tokens: Tokens, options: GrpoConfig) -> Tensor:
    """Of the policy to the old one: token by token [B, T], or each row's geometric mean [B, 1].

    Source: `sequence` is GSPO, arXiv:2507.18071 eq. 7.
    """
    log_ratio_BT = tokens.log_ratio_BT
    return (log_ratio_BT if options.level == "token" else tokens.row_mean(log_ratio_BT)).exp()


def sampler_correction(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """Ratio of the old policy to the sampler, capped, or 0 beyond the cap: [B, T], or [B, 1] of a row's product.

    A token whose logprob the sampler did not give counts as 1.

    Source: truncated importance sampling, https://fengyao.notion.site/off-policy-rl; masked as TRL 1.16 has it.
    """
    if options.importance_sampling == "none":
        return None
    sampler_logprobs_BT = wanted(tokens.sampler_logprobs_BT, "sampler_logps", "importance_sampling")
    level, _, bound = options.importance_sampling.partition("_")
    log_ratio = ((tokens.old_logprobs_BT - sampler_logprobs_BT) * tokens.mask_BT).nan_to_num(nan=0.0)
    ratio = (log_ratio if level == "token" else log_ratio.sum(1, keepdim=True)).exp()
    low = 0.0 if options.clip_min is None else options.clip_min
    high = float("inf") if options.clip_max is None else options.clip_max
    return ratio.clamp(low, high) if bound == "truncate" else ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def off_policy_mask(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """False where a row is worse than its group and has drifted too far from its sampler, as a mean over its tokens.

    Source: DeepSeek-V3.2, arXiv:2512.02556 eq. 9.
    """
    if options.off_policy_mask is None:
        return None
    sampled_BT = tokens.old_logprobs_BT if tokens.sampler_logprobs_BT is None else tokens.sampler_logprobs_BT
    drift_B1 = tokens.row_mean((sampled_BT - tokens.logprobs_BT.detach()).nan_to_num(nan=0.0))
    return (tokens.advantages_BT >= 0) | (drift_B1 <= options.off_policy_mask)


def top_entropy_mask(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """True for the `top_entropy_quantile` of tokens that the policy is least sure of.

    Source: Beyond the 80/20 Rule, arXiv:2506.01939 §5.
    """
    if options.top_entropy_quantile == 1:
        return None
    entropy_BT, threshold = wanted(tokens.entropy_BT, "entropy", "top_entropy_quantile"), tokens.entropy_threshold
    if threshold is None:
        threshold = entropy_quantile(entropy_BT[tokens.mask_BT.bool()], 1 - options.top_entropy_quantile)
    return entropy_BT * tokens.mask_BT >= threshold


def entropy_quantile(entropies_N: Tensor, quantile: float) -> Tensor:
    """A scalar, in float32 as in TRL; without any tokens +inf, which none reaches."""
    if not entropies_N.numel():
        return entropies_N.new_full((), float("inf"))
    return torch.quantile(entropies_N.float(), quantile)


def reference_kl(tokens: Tokens, options: GrpoConfig) -> Tensor | None:
    """Estimate of KL(policy ‖ reference), whose gradient is unbiased off-policy if it is multiplied by the ratio.

    Source: DeepSeek-V3.2, arXiv:2512.02556 eq. 7.
    """
    if options.beta == 0:
        return None
    kl_BT = k3(wanted(tokens.ref_logprobs_BT, "ref_logps", "beta"), tokens.logprobs_BT)
    return kl_BT * policy_ratio(tokens, options) if options.bias_correction_kl else kl_BT


def k3(numerator_logprobs: Tensor, denominator_logprobs: Tensor) -> Tensor:
    """Estimate, token by token, of KL(denominator ‖ numerator) for samples of the denominator; never negative.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = numerator_logprobs - denominator_logprobs
    return log_ratio.exp() - log_ratio - 1
