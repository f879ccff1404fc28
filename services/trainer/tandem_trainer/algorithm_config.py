"""Options of the algorithms: the keys below `trainer.grpo` and `trainer.online_dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tandem_protocol.config import Section

FUNCTION = r"^[\w.]+:\w+$"
"""`module:function`."""


class GrpoConfig(Section):
    """Group Relative Policy Optimization and its variants. GSPO is `loss_type: grpo` with `level: sequence`."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"] = "dapo"
    """What a token contributes to the loss, and how tokens are summed. `bnpo` and `dapo` are the same here."""
    level: Literal["token", "sequence"] = "token"
    """Take the ratio to the old policy of each token, or of the complete sequence (as a geometric mean)."""
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL divergence from the start policy; 0: no reference model is kept."""
    bias_correction_kl: bool = True
    """Multiply the KL by the ratio, so that its gradient is unbiased off-policy."""
    epsilon: float = Field(0.2, ge=0.0)
    """Clip the ratio to the old policy from below at 1 - `epsilon`."""
    epsilon_high: float | None = Field(None, ge=0.0)
    """Clip the ratio from above at 1 + `epsilon_high`; None: the value of `epsilon`. For `cispo` it is the cap of the
    ratio itself, for example 5.0."""
    delta: float | None = Field(None, gt=0.0)
    """Cap of the ratio for negative advantages, above 1 + `epsilon_high`; None: no cap."""
    sapo_temperature_pos: float = Field(1.0, gt=0.0)
    """For `sapo`: temperature of the gate for tokens with a positive advantage."""
    sapo_temperature_neg: float = Field(1.05, gt=0.0)
    """For `sapo`: the same for a negative advantage."""
    vespo_k_pos: float = 2.0
    """For `vespo`: exponent k of the weight for a positive advantage."""
    vespo_lambda_pos: float = 3.0
    """For `vespo`: decay λ of the weight for a positive advantage."""
    vespo_k_neg: float = 3.0
    """For `vespo`: exponent k of the weight for a negative advantage."""
    vespo_lambda_neg: float = 2.0
    """For `vespo`: decay λ of the weight for a negative advantage."""
    top_entropy_quantile: float = Field(1.0, ge=0.0, le=1.0)
    """Learn only from this part of the tokens, those with the highest entropy. Below 1, each optimizer step takes one
    more forward pass, which measures the entropy."""
    off_policy_mask: float | None = Field(None, ge=0.0)
    """Leave out completions with a negative advantage that drifted further than this from their sampler, in nats per
    token; None: keep them."""
    importance_sampling: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Correct for tokens to which an older policy, or the sampler's own arithmetic, gave another probability. The loss
    is multiplied by the ratio of each token or of the complete sequence, which is capped (`truncate`) or, beyond the
    cap, set to 0 (`mask`)."""
    clip_max: float | None = Field(3.0, gt=0.0)
    """Cap of the ratio of `importance_sampling`; None: no cap."""
    clip_min: float | None = Field(None, ge=0.0)
    """Lower bound of the ratio of `importance_sampling`; None: no bound."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of the group or of the batch, or not at all."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several rewards: scale their weighted sum, or scale each in its group (whatever `scale_rewards` says), sum
    them, and scale the sum over the batch."""
    mask_truncated_completions: bool = False
    """Leave completions that hit `max_completion_length` out of the loss."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts, all within one version."""

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def _options_fit(self) -> GrpoConfig:
        if self.loss_type == "vespo" and self.importance_sampling.startswith("sequence"):
            raise ValueError(
                f"importance_sampling is {self.importance_sampling} for loss_type vespo, which multiplies the tokens' "
                "ratios by itself, expected none, token_truncate or token_mask"
            )
        if self.clip_min is not None and self.clip_max is not None and self.clip_min >= self.clip_max:
            raise ValueError(f"clip_min is {self.clip_min} for clip_max {self.clip_max}, expected less than that")
        if self.importance_sampling.endswith("truncate") and self.clip_min is None and self.clip_max is None:
            raise ValueError(f"importance_sampling {self.importance_sampling} got neither clip_max nor clip_min")
        return self


class OnlineDpoConfig(Section):
    """Online Direct Preference Optimization: of two completions for a prompt, the better one is preferred."""

    judge: str | None = Field(None, pattern=FUNCTION)
    """`module:function` of the project that says which completion is better; None: the rewards say it. It is called
    with `prompts, completions, **columns`, of which `completions` has pairs. It returns, for each pair, 0, 1, or None
    for neither."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of a pair: DPO's `sigmoid`, or `ipo`."""
    beta: float = Field(0.1, gt=0.0)
    """How strongly the policy is held at the start policy; for `ipo` it is τ."""
    missing_eos_penalty: float | None = Field(None, gt=0.0)
    """Subtracted from the reward of a completion that hit `max_completion_length`; None: nothing is. The completion
    that a judge prefers has the reward 1."""
