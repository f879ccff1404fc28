"""Configuration of the learning side: the algorithms, the optimizer, how an update is computed, and LoRA.

The text below a field is its description in docs/reference/config.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .names import ProjectName, is_of_project, known_or_of_project
from .sections import FUNCTION_NAME, Section

_GrpoLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
_PairLoss = Literal["sigmoid", "ipo"]


class GrpoConfig(Section):
    """Group Relative Policy Optimization and its variants. GSPO is `loss_type: grpo` with `level: sequence`."""

    loss_type: Annotated[_GrpoLoss | ProjectName, known_or_of_project(_GrpoLoss)] = "dapo"
    """Loss per token, and how the tokens are averaged. With the clipped ratio: `grpo` (mean per completion, then over
    completions), `dapo` and `bnpo` (mean over all tokens; the two are the same here), `dr_grpo` (sum per completion,
    divided by `max_completion_length`), `luspo` (sum per completion). With another objective: `cispo`, `sapo`,
    `vespo`. `module:function` is a loss of your project: docs/integrate/losses.md."""
    loss_arguments: dict[str, Any] = {}
    """More keyword arguments for a `loss_type` of your project."""
    reduction: Literal["token_mean", "trajectory_mean", "trajectory_sum", "constant_mean"] | None = None
    """How the losses of the tokens become one number. `token_mean`: mean over all tokens (`dapo`). `trajectory_mean`:
    mean per completion, then over completions (`grpo`). `trajectory_sum`: sum per completion, then mean (`luspo`).
    `constant_mean`: the same, divided by `max_completion_length` (`dr_grpo`). `null`: as in `loss_type`; `token_mean`
    for a loss of your project."""
    advantage: str | None = Field(None, pattern=FUNCTION_NAME)
    """`module:function` of your project that computes the advantages of a group from its rewards
    (docs/integrate/losses.md). `scale_rewards` and `multi_objective_aggregation` then have no effect. `null`: the
    reward minus the mean of the group, scaled by `scale_rewards`."""
    advantage_arguments: dict[str, Any] = {}
    """More keyword arguments for `advantage`."""
    level: Literal["token", "sequence"] = "token"
    """Compute the ratio to the old policy for each token (`token`) or for each completion (`sequence`). The ratio of a
    completion is the geometric mean over its tokens."""
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL penalty against the initial policy. Raise it if the policy drifts too far. At 0 there is no
    penalty and no reference model in memory."""
    bias_correction_kl: bool = True
    """Multiply the KL penalty by the policy ratio, so that its gradient is unbiased for off-policy tokens. Only used if
    `beta` is above 0."""
    epsilon: float = Field(0.2, ge=0.0)
    """Lower clipping bound of the ratio: 1 − `epsilon`. The ratio is 1 in the first optimizer step of a batch, so
    clipping matters only if `num_iterations` is above 1."""
    epsilon_high: float | None = Field(None, ge=0.0)
    """Upper clipping bound of the ratio: 1 + `epsilon_high`. `null`: the same as `epsilon`. DAPO uses 0.28. For
    `cispo`, it is the cap itself, without the 1. There it must be set to 1 or more, for example to 5.0."""
    delta: float | None = Field(None, gt=0.0)
    """Upper bound of the ratio for tokens with a negative advantage, which `epsilon_high` does not bound. Choose a
    value above 1 + `epsilon_high`. `null`: no bound."""
    sapo_temperature_pos: float = Field(1.0, gt=0.0)
    """For `sapo`: temperature of the gate for tokens with a positive advantage. A higher value suppresses ratios far
    from 1 more."""
    sapo_temperature_neg: float = Field(1.05, gt=0.0)
    """For `sapo`: temperature of the gate for tokens with a negative advantage."""
    vespo_k_pos: float = 2.0
    """For `vespo`: shape k of the weight w^k · exp(λ · (1 − w)), where w is the ratio of the completion to its sampler.
    This is k for advantages of 0 or more."""
    vespo_lambda_pos: float = 3.0
    """For `vespo`: rate λ of that weight for advantages of 0 or more. A higher value suppresses large ratios more."""
    vespo_k_neg: float = 3.0
    """For `vespo`: shape k for negative advantages."""
    vespo_lambda_neg: float = 2.0
    """For `vespo`: rate λ for negative advantages."""
    top_entropy_quantile: float = Field(1.0, ge=0.0, le=1.0)
    """Fraction of tokens to learn from, those with the highest entropy. Example: 0.2 uses the top 20 %. 1 uses all.
    Below 1, each optimizer step needs one more forward pass to compute the entropies."""
    off_policy_mask: float | None = Field(None, ge=0.0)
    """Leave out a completion with a negative advantage if its mean logprob has fallen by more than this since it was
    sampled, in nats per token. `null`: keep all completions."""
    importance_sampling: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Correct for tokens whose probability differed when they were sampled, because the policy was older or the
    generator computes differently. The loss is multiplied by the ratio of each token (`token_`) or of the completion
    (`sequence_`). A ratio above `clip_max` is capped (`_truncate`) or set to 0 (`_mask`)."""
    clip_max: float | None = Field(3.0, gt=0.0)
    """Upper bound of the ratio of `importance_sampling`. `null`: no bound."""
    clip_min: float | None = Field(None, ge=0.0)
    """Lower bound of the ratio of `importance_sampling`. A ratio below it is raised to it (`_truncate`) or set to 0
    (`_mask`). `null`: no bound."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """An advantage is the reward minus the mean of its group. It is divided by the standard deviation of the rewards in
    the group (`group`) or in the batch (`batch`), or by nothing (`none`). `none` avoids the bias towards prompts that
    are very easy or very hard (Dr. GRPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """How several rewards are combined. `sum_then_normalize`: normalize their weighted sum. `normalize_then_sum`:
    normalize each reward in its group, whatever `scale_rewards` is, then sum them and normalize over the batch. Use it
    if one reward varies much more than the others (GDPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that reach `max_completion_length`, and episodes that reach `max_turns`, out of the loss. Use
    it if a reward means little for an incomplete answer."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts. All of them belong to one step and produce one version."""

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or `epsilon` if it is not set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def _arguments_have_a_function(self) -> GrpoConfig:
        _check_arguments(self.loss_type, self.loss_arguments)
        if self.advantage_arguments and self.advantage is None:
            raise ValueError("advantage_arguments is set, but advantage is null, expected module:function")
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> GrpoConfig:
        if self.loss_type == "vespo" and self.importance_sampling.startswith("sequence"):
            raise ValueError(
                f"importance_sampling is {self.importance_sampling} for loss_type vespo, expected none, token_truncate "
                "or token_mask: vespo computes the ratio of the completion from those of the tokens"
            )
        if self.clip_min is not None and self.clip_max is not None and self.clip_min >= self.clip_max:
            raise ValueError(f"clip_min is {self.clip_min}, expected less than clip_max, which is {self.clip_max}")
        if self.importance_sampling.endswith("truncate") and self.clip_min is None and self.clip_max is None:
            raise ValueError(
                f"importance_sampling is {self.importance_sampling} without clip_max and clip_min, expected at least "
                "one of them"
            )
        return self


class OnlineDpoConfig(Section):
    """Online Direct Preference Optimization: for each prompt, the better of two completions is preferred."""

    judge: str | None = Field(None, pattern=FUNCTION_NAME)
    """`module:function` of the project that compares two completions, instead of `rewards`. It is called with `prompts,
    completions, **columns`; each item of `completions` is a pair. It returns a list with one item per pair: 0 if the
    first is better, 1 if the second is, None if neither is."""
    loss_type: Annotated[_PairLoss | ProjectName, known_or_of_project(_PairLoss)] = "sigmoid"
    """`sigmoid` is the loss of DPO. `ipo` is that of Identity Preference Optimization, which overfits less.
    `module:function` is a loss of your project: docs/integrate/losses.md."""
    loss_arguments: dict[str, Any] = {}
    """More keyword arguments for a `loss_type` of your project."""
    beta: float = Field(0.1, gt=0.0)
    """How strongly the policy is kept near the initial policy. For `ipo` it is the parameter τ."""
    missing_eos_penalty: float | None = Field(None, gt=0.0)
    """Subtracted from the reward of a completion that reaches `max_completion_length`. With a judge, the preferred
    completion has the reward 1 and the other 0. `null`: no penalty."""

    @model_validator(mode="after")
    def _arguments_have_a_function(self) -> OnlineDpoConfig:
        _check_arguments(self.loss_type, self.loss_arguments)
        return self


def _check_arguments(loss_type: str, arguments: dict[str, Any]) -> None:
    if arguments and not is_of_project(loss_type):
        raise ValueError(f"loss_arguments is set for loss_type {loss_type}, expected module:function of the project")


class OptimConfig(Section):
    """The AdamW optimizer and its learning rate schedule."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` needs a quarter of the memory for the optimizer state. It requires the package `bitsandbytes`."""
    learning_rate: float = Field(1e-6, gt=0.0)
    """Learning rate after the warmup. LoRA needs about ten times the value of full training."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Strength of the weight decay. It is not applied to biases and norms."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay rate of the mean of the gradients."""
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """Decay rate of the mean of the squared gradients."""
    adam_epsilon: float = Field(1e-8, gt=0.0)
    """Added to the denominator of an update for numerical stability."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """A gradient with a larger norm is scaled down to this norm."""
    lr_scheduler_type: Literal["constant_with_warmup", "constant", "linear", "cosine"] = "constant_with_warmup"
    """Shape of the learning rate schedule, with the names of `transformers.get_scheduler`. `linear` and `cosine` decay
    to 0 at `max_steps`. `constant` ignores `warmup_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0 to `learning_rate`."""


class LearnerConfig(Section):
    """How an update is computed: memory, time and precision. Except for `dtype`, results are equal up to rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass, and of the published weights. The optimizer's copy of the parameters
    is always float32. Use `bfloat16` on GPUs."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """How several trainer processes hold the model. `ddp`: each has a complete copy. `fsdp2`: parameters, gradients and
    optimizer state are sharded. Use `fsdp2` if the model and its optimizer do not fit on one device."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Padded tokens per forward pass. The memory for activations is proportional to it. Lower it if memory runs out.
    `null`: 1024 on CPUs, 8192 on GPUs."""
    logprob_chunk_size: int = Field(1024, ge=1)
    """Number of tokens whose logits are in memory at the same time. Lower it if memory runs out and the vocabulary is
    large."""
    shared_prompts: Literal["auto", "never"] = "auto"
    """`auto`: compute a prompt once for all completions that begin with it, where that saves at least an eighth of the
    tokens. With `gradient_checkpointing` or `fsdp2`, it is computed once per micro-batch, where that saves an eighth of
    the estimated time. Not with models that compute something else then, or whose sliding window does not fit into a
    micro-batch; the log says so (docs/adr/0005-a-prompt-is-computed-once.md). `never`: compute it with each
    completion."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them. This saves memory and takes up to a third
    more time. Lower `max_tokens_per_micro_batch` first: that costs less, until it is the length of one row."""
    compile: bool = False
    """Compile the layers with `torch.compile`. The first update then takes longer. It needs a C++ compiler."""


class LoraConfig(Section):
    """Train a low-rank adapter; the model's own weights are frozen. The adapter has no dropout."""

    r: int = Field(16, ge=1)
    """Rank of the adapter. The generator needs `generator.vllm: {enable_lora: true, max_lora_rank: …}` with at least
    this rank."""
    alpha: float = Field(32.0, gt=0.0)
    """Scale of the adapter: its output is multiplied by `alpha / r`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt, or the ends of their names, such as `[q_proj, v_proj]`. `all-linear` adapts
    all of them except the output embedding."""
