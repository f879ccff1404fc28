"""The trainer's options. Names are TRL's wherever the meaning is TRL's, so that a config can be carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tandem_protocol.config import Section, SharedConfig
from tandem_protocol.messages import SwitchMode, TokenId

FUNCTION = r"^[\w.]+:\w+$"
"""`module:function`."""


class PromptsConfig(Section):
    """Where prompts come from. Columns besides the prompt reach the reward functions by name."""

    source: str = "prompts.jsonl"
    """A JSONL, JSON, CSV, TSV or parquet file, or anything `datasets.load_dataset` takes (a hub id, a folder)."""
    subset: str | None = None
    split: str = "train"
    """Also a slice, as `train[:1000]`."""
    column: str = "prompt"
    """Column with the prompt: a string, or a conversation (list of role/content), which gets the chat template."""
    shuffle: bool = True
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""
    chat_template_kwargs: dict[str, Any] = {}
    """Given to the chat template by name, such as `enable_thinking: false`; `chat_template` takes the model's place."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of functions that the chat template offers; a row's own column `tools` takes their place."""


class RewardConfig(Section):
    """One reward function from the project."""

    function: str = Field(pattern=FUNCTION)
    """`module:function`, called with `prompts, completions, completion_ids, **columns`; gives a float or None a row."""
    weight: float = 1.0
    arguments: dict[str, Any] = {}
    """Given to the function by name, besides the columns."""
    timeout_s: float | None = Field(None, gt=0.0)
    """Deadline of one call; None: `trainer.reward_timeout_s`."""
    sandbox: bool | None = None
    """Run it in a process without credentials that is killed at the deadline: for rewards that run what a model wrote.
    None: as the function asks. Of the ready-made functions, `math_answer` asks for it. docs/train/rewards.md says what
    the sandbox keeps out."""


class RolloutConfig(Section):
    """What is asked of the generator each step."""

    num_prompts: int = Field(16, ge=1)
    """Prompts a step (P), all ranks together."""
    num_generations: int = Field(8, ge=1)
    """Completions a prompt (G)."""
    max_completion_length: int = Field(256, ge=1)
    """Tokens."""
    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """This and the next three reshape what is sampled from, but not the trainer's logprobs: other values than the
    defaults bias `kl_sampler` and the importance-sampling correction."""
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0)
    stop_token_ids: tuple[TokenId, ...] = ()
    timeout_s: float = Field(600.0, gt=0.0)
    """How long one step's rollouts may take before the run stops with an error."""
    stall_timeout_s: float = Field(300.0, gt=0.0)
    """How long a replica may finish no group before the missing ones are asked of the next."""


class GrpoConfig(Section):
    """Group Relative Policy Optimization and its variants. GSPO is `loss_type: grpo` with `level: sequence`."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"] = "dapo"
    """What a token contributes and how tokens are summed up; `bnpo` and `dapo` are one here."""
    level: Literal["token", "sequence"] = "token"
    """Whether the ratio to the old policy is of each token or of a whole completion (then as a geometric mean)."""
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL to the start policy; 0 keeps no reference model."""
    bias_correction_kl: bool = True
    """Multiply the KL by the ratio, so that its gradient is unbiased off-policy."""
    epsilon: float = Field(0.2, ge=0.0)
    epsilon_high: float | None = Field(None, ge=0.0)
    """None: the same as `epsilon`. For `cispo` it is the ratio's cap itself, so say it there (5.0)."""
    delta: float | None = Field(None, gt=0.0)
    """Cap of the ratio where the advantage is negative, above 1 + `epsilon_high`; None: no cap."""
    sapo_temperature_pos: float = Field(1.0, gt=0.0)
    sapo_temperature_neg: float = Field(1.05, gt=0.0)
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    top_entropy_quantile: float = Field(1.0, ge=0.0, le=1.0)
    """Learn from this part of the tokens only, those with the highest entropy. Below 1, each optimizer step has one
    forward pass more, to know it."""
    off_policy_mask: float | None = Field(None, ge=0.0)
    """Leave out completions with a negative advantage that drifted further from their sampler (nats a token)."""
    importance_sampling: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Corrects for tokens that an older policy, or the sampler's own arithmetic, gave another probability: by the ratio
    of each token or of a whole completion, either capped or, beyond the cap, 0."""
    clip_max: float | None = Field(3.0, gt=0.0)
    """Cap of that correction's ratio; None: no cap."""
    clip_min: float | None = Field(None, ge=0.0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several rewards: scale their weighted sum, or scale each in its group (whatever `scale_rewards` says), sum
    them, and scale that over the batch."""
    mask_truncated_completions: bool = False
    """Leave completions that hit `max_completion_length` out of the loss."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer steps for each batch of rollouts, all within one version."""

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
    """Online Direct Preference Optimization: of two completions a prompt, the better one is preferred."""

    judge: str | None = Field(None, pattern=FUNCTION)
    """`module:function` from the project that says which is better, instead of rewards. Called with `prompts,
    completions, **columns`, of which `completions` has pairs; gives 0, 1 or, for neither, None a pair."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = Field(0.1, gt=0.0)
    """How much it costs to leave the start policy; for `ipo` it is τ."""
    missing_eos_penalty: float | None = Field(None, gt=0.0)
    """Taken off the reward of a completion that hit `max_completion_length`; what a judge prefers has the reward 1."""


class OptimConfig(Section):
    """AdamW."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its moments in a quarter of the memory, and is that of bitsandbytes, if you install it."""
    learning_rate: float = Field(1e-6, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    """Biases and norms are spared."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    lr_scheduler_type: Literal["constant_with_warmup", "constant", "linear", "cosine"] = "constant_with_warmup"
    """As `transformers.get_scheduler` names them; those that need nothing but `warmup_steps` and `max_steps`."""
    warmup_steps: int = Field(0, ge=0)


class LearnerConfig(Section):
    """How an update is computed; apart from `dtype`, changes its memory and time, never its value but by rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic and of what is published; the optimizer's parameters are float32 either way."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """What several processes do with the model: each holds all of it (`ddp`), or parameters, gradients and the
    optimizer's state are spread over them (`fsdp2`)."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Padded tokens of one forward pass; None: 1024 on CPUs, 8192 on GPUs. Activations are in proportion to it."""
    logprob_chunk_size: int = Field(1024, ge=1)
    """Positions whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: up to a third more time. Where memory is
    short, lower `max_tokens_per_micro_batch` first, which costs less until it is a row's length."""
    compile: bool = False
    """Let `torch.compile` fuse the layers, from the first update on; it needs a C++ compiler."""


class LoraConfig(Section):
    """Train a low-rank adapter beside frozen weights. Its dropout is 0, as all dropout here."""

    r: int = Field(16, ge=1)
    """Rank. The generator serves up to `generator.vllm.max_lora_rank`, with `enable_lora: true`."""
    alpha: float = Field(32.0, gt=0.0)
    """The adapter counts `alpha / r` times."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names (or their ends) of the linear layers that get one; `all-linear` leaves the output embedding out."""


class CheckpointConfig(Section):
    """What survives a crash."""

    every_steps: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)
    keep_best: bool = False
    """Write a checkpoint at each evaluation that is the run's best so far (by mean reward), and keep that one too."""


class PublishConfig(Section):
    """How new weights reach the generators."""

    mode: SwitchMode = SwitchMode.IN_FLIGHT
    keep: int = Field(2, ge=1)
    """Versions that stay in the store."""
    timeout_s: float = Field(300.0, gt=0.0)


class EvalConfig(Section):
    """Completions for held-out prompts, before the first step, after the last and every `every_steps`.

    With a judge, a completion's reward is how it fares against the first policy's for the same prompt: 1 is a win in
    both orders, 0.5 a tie."""

    prompts: PromptsConfig
    every_steps: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0.0)
    """0 is greedy; above, each prompt is sampled with the same seed every time."""
    num_generations: int = Field(1, ge=1)
    """Completions a prompt."""
    pass_at: tuple[int, ...] = ()
    """For each k of these, each reward function's pass@k: the probability that one of k completions gets 1 or more."""

    @model_validator(mode="after")
    def _samples_are_enough_and_differ(self) -> EvalConfig:
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(
                f"num_generations is {self.num_generations} at temperature 0, which gives the same completion each "
                "time, expected a temperature above 0"
            )
        if wrong := [k for k in self.pass_at if not 1 <= k <= self.num_generations]:
            raise ValueError(f"pass_at holds {wrong}, expected 1 to num_generations, which is {self.num_generations}")
        return self


class TrainerConfig(Section):
    """Section `trainer`."""

    output_dir: Path = Path("runs")
    run_name: str = Field("default", pattern=r"^\w[\w.-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the order of prompts and of everything random in the trainer. NumPy takes 32 bits."""
    max_steps: int = Field(ge=1)
    max_lag: int = Field(1, ge=0)
    """Versions that rollouts may be behind the learner; 0 is strictly on-policy."""
    algorithm: Literal["grpo", "online_dpo"] = "grpo"
    prompts: PromptsConfig = PromptsConfig()
    rewards: tuple[RewardConfig, ...] = ()
    """At least one, or `online_dpo.judge`."""
    reward_errors: Literal["fail", "drop"] = "fail"
    """What an exception in a reward function does: end the run, or leave that row out of the update."""
    reward_timeout_s: float = Field(300.0, gt=0.0)
    """How long one call of a reward function may take; a synchronous one's wait for its turn is left out."""
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    """For `algorithm: grpo`."""
    online_dpo: OnlineDpoConfig = OnlineDpoConfig()
    """For `algorithm: online_dpo`."""
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig | None = None
    """None: all parameters are trained."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    publish: PublishConfig = PublishConfig()
    eval: EvalConfig | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the figures of `metrics.jsonl` go besides. Needs the tracker's package; `tensorboard` writes into the run's
    folder, `trackio` on this machine, `wandb` to its service (WANDB_MODE=offline: to the run's folder)."""
    max_mismatch: float = Field(0.2, gt=0.0)
    """How far trainer and generators may differ in the logprobs of the same tokens under the same weights, in nats per
    token (a moving average). Above it the run stops: the two sides compute different models."""
    log_completions: int = Field(4, ge=0)
    """Completions a step that `rollouts.jsonl` keeps."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Where Prometheus finds the newest step (`/metrics`, with the bearer token); None: nowhere."""
    start_timeout_s: float = Field(900.0, gt=0.0)
    """How long to wait for the generators to be ready."""

    @model_validator(mode="after")
    def _best_is_known(self) -> TrainerConfig:
        if self.checkpoint.keep_best and (self.eval is None or self.eval.every_steps is None):
            raise ValueError("checkpoint.keep_best is set without eval.every_steps, expected evaluations to choose by")
        return self

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> TrainerConfig:
        generations = self.rollout.num_generations
        if self.algorithm == "online_dpo" and generations != 2:
            raise ValueError(f"rollout.num_generations is {generations}; online_dpo compares two completions, wanted 2")
        if generations < 2:
            raise ValueError("rollout.num_generations is 1; an advantage is relative to its group, wanted 2 or more")
        return self

    @model_validator(mode="after")
    def _something_says_what_is_better(self) -> TrainerConfig:
        judge = self.online_dpo.judge
        if judge and self.algorithm != "online_dpo":
            raise ValueError(f"online_dpo.judge is {judge!r}, but algorithm is {self.algorithm}, expected online_dpo")
        if judge and self.rewards:
            raise ValueError("both rewards and online_dpo.judge say what is better, expected one of them")
        if not judge and not self.rewards:
            raise ValueError("rewards is empty, expected at least one, or online_dpo.judge with algorithm online_dpo")
        if judge and self.eval and self.eval.num_generations > 1:
            raise ValueError(
                f"eval.num_generations is {self.eval.num_generations}; a judge compares one completion a prompt with "
                "the first policy's, wanted 1"
            )
        return self

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the functions that say what is better."""
        return tuple(reward.function for reward in self.rewards) or (str(self.online_dpo.judge),)

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.run_name


class Settings(Section):
    """What the trainer reads of the configuration."""

    shared: SharedConfig
    trainer: TrainerConfig
