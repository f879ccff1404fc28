"""The limits of a run's alerts. docs/train/alerts.md explains each alert."""

from __future__ import annotations

from pydantic import Field

from .sections import Section

MAX_IN_A_ROW = 64
"""The trainer looks at this many records. It would never see a longer row."""


class AlertsConfig(Section):
    """Limits of the alerts that a run raises about its own figures. `null` switches one off."""

    mismatch: float | None = Field(1.0, gt=0.0)
    """Difference between trainer and generators with the same weights, as a multiple of what rounding explains: 0.001
    nats per token if both use float32, else 0.05."""
    kl_sampler: float | None = Field(0.1, gt=0.0)
    """`kl_sampler`, in nats per token."""
    entropy_collapse: float | None = Field(0.01, gt=0.0)
    """Lowest entropy in nats per token, a mean over 10 steps. Rewards that are nearly all equal raise no alert: the
    task is solved."""
    rewards_equal: int | None = Field(5, ge=1, le=MAX_IN_A_ROW)
    """Batches in a row in which each group has equal rewards."""
    reward_missing: float | None = Field(0.5, gt=0.0, le=1.0)
    """Share of completions for which no function gave a reward."""
    reward_function_missing: float | None = Field(0.9, gt=0.0, le=1.0)
    """Share of completions for which one of several reward functions returned None."""
    truncated: float | None = Field(0.5, gt=0.0, le=1.0)
    """Share of completions that were cut off."""
    length_explosion: float | None = Field(3.0, gt=1.0)
    """Mean length of completions, as a multiple of what it was some tens of steps before."""
    repetition: float | None = Field(0.3, gt=0.0, le=1.0)
    """Share of completions that repeat the same text again and again."""
    grad_norm_spike: float | None = Field(10.0, gt=1.0)
    """Norm of the gradient, as a multiple of the median of the 20 steps before."""
    not_finite: int | None = Field(1, ge=1, le=MAX_IN_A_ROW)
    """Steps in a row whose loss or gradient is NaN or infinite."""
    learning_rate_zero: int | None = Field(5, ge=1, le=MAX_IN_A_ROW)
    """Steps in a row with a learning rate of 0."""
    clipped: float | None = Field(0.5, gt=0.0, le=1.0)
    """Share of tokens whose probability ratio is clipped."""
    kl_reference: float | None = Field(2.0, gt=0.0)
    """KL divergence to the start policy, in nats per token."""
    reasked: float | None = Field(1.0, gt=0.0)
    """Groups that were asked for again because they were too old, per group that was learned from."""
    tool_errors: float | None = Field(0.8, gt=0.0, le=1.0)
    """Share of tool calls that were answered with an error."""
    evaluation_falls: float | None = Field(0.1, gt=0.0)
    """By what share of its best value the reward of the evaluation falls while the training reward rises."""
