"""The trainer's options. Names are TRL's wherever the meaning is TRL's, so that a config can be carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tandem_protocol.config import Section, SharedConfig
from tandem_protocol.messages import SwitchMode, TokenId

from .algorithm_config import FUNCTION
from .algorithm_config import GrpoConfig as GrpoConfig
from .algorithm_config import OnlineDpoConfig as OnlineDpoConfig


class PromptsConfig(Section):
    """Where the prompts come from. Columns besides the prompt reach the reward functions by name."""

    source: str = "prompts.jsonl"
    """A JSONL, JSON, CSV, TSV or parquet file, or anything `datasets.load_dataset` takes (a hub id, a folder)."""
    subset: str | None = None
    """Configuration name of a data set that has several; None: its default."""
    split: str = "train"
    """Split of the data set, or a slice of it such as `train[:1000]`."""
    column: str = "prompt"
    """Column with the prompt: a string, or a conversation (list of role/content), which gets the chat template."""
    shuffle: bool = True
    """Take the rows in random order, which `trainer.seed` decides."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, from the first on; None: all."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`. The argument `chat_template` replaces the
    model's template."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of functions that the chat template offers. A row's own column `tools` replaces them."""


class RewardConfig(Section):
    """One reward function from the project."""

    function: str = Field(pattern=FUNCTION)
    """`module:function`, called with `prompts, completions, completion_ids, **columns`; gives a float or None a row."""
    weight: float = 1.0
    """Factor of this reward in the sum of all."""
    arguments: dict[str, Any] = {}
    """Given to the function by name, besides the columns."""
    timeout_s: float | None = Field(None, gt=0.0)
    """Deadline of one call; None: `trainer.reward_timeout_s`."""
    sandbox: bool | None = None
    """Run it in a process without credentials that is killed at the deadline: for rewards that run what a model wrote.
    None: as the function asks. Of the ready-made functions, `math_answer` asks for it. docs/train/rewards.md says what
    the sandbox keeps out."""


class RolloutConfig(Section):
    """What the generators are asked for in each step."""

    num_prompts: int = Field(16, ge=1)
    """Prompts per step (P), all ranks together."""
    num_generations: int = Field(8, ge=1)
    """Completions per prompt (G)."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature. The trainer's logprobs are computed at the same temperature."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample from the most likely tokens only, which together have this probability; 1: from all. This option and the
    next three change what is sampled, but not the trainer's logprobs: values other than the defaults bias `kl_sampler`
    and the importance-sampling correction."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens only; 0: from all."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Leave out tokens less likely than this part of the most likely token's probability."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Above 1, make tokens less likely that the text already has."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Tokens that end a completion, besides the model's own end-of-sequence tokens."""
    timeout_s: float = Field(600.0, gt=0.0)
    """How long the rollouts of one step may take before the run stops with an error."""
    stall_timeout_s: float = Field(300.0, gt=0.0)
    """How long a replica may finish no group before its missing groups are requested from the next replica."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """Implementation of AdamW. `adamw_8bit` keeps its moments in a quarter of the memory; it needs the package
    bitsandbytes."""
    learning_rate: float = Field(1e-6, gt=0.0)
    """Peak learning rate, after the warm-up."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's weight decay. Biases and norms have none."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the gradient's moving average."""
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """Decay of the squared gradient's moving average."""
    adam_epsilon: float = Field(1e-8, gt=0.0)
    """Added to the denominator, for numerical stability."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients with a larger norm are scaled down to it."""
    lr_scheduler_type: Literal["constant_with_warmup", "constant", "linear", "cosine"] = "constant_with_warmup"
    """Schedule of the learning rate, as `transformers.get_scheduler` names it."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""


class LearnerConfig(Section):
    """How an update is computed. All but `dtype` change its memory and time, and its value by rounding only."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation and of the published weights. The optimizer's parameters are float32 either way."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes hold the model: each holds all of it (`ddp`), or parameters, gradients and optimizer state
    are sharded (`fsdp2`)."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=1)
    """Padded tokens of one forward pass; None: 1024 on CPUs, 8192 on GPUs. The memory for activations is proportional
    to it."""
    logprob_chunk_size: int = Field(1024, ge=1)
    """Number of positions whose logits are in memory at one time."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them, which takes up to a third more time. If
    memory is short, lower `max_tokens_per_micro_batch` first: that costs less until it is as small as the longest
    row."""
    compile: bool = False
    """Let `torch.compile` fuse the layers, from the first update on. It needs a C++ compiler."""


class LoraConfig(Section):
    """Train a low-rank adapter beside frozen weights. Its dropout is 0, like all dropout here."""

    r: int = Field(16, ge=1)
    """Rank of the adapter. The generator serves up to `generator.vllm.max_lora_rank`, with `enable_lora: true`."""
    alpha: float = Field(32.0, gt=0.0)
    """Scale of the adapter: it is multiplied by `alpha / r`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter, or the ends of the names. `all-linear` is all but the output
    embedding."""


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes."""

    every_steps: int = Field(20, ge=1)
    """Steps between two checkpoints."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay; older ones are deleted."""
    keep_best: bool = False
    """Write a checkpoint at each evaluation that is the run's best so far (by mean reward), and keep the best one
    too."""


class PublishConfig(Section):
    """How new weights reach the generators."""

    mode: SwitchMode = SwitchMode.IN_FLIGHT
    """What happens to running requests when a generator switches: they go on with the new weights (`in_flight`), finish
    first (`drain`), or are ended (`abort`)."""
    keep: int = Field(2, ge=1)
    """Number of newest versions that stay in the weight store."""
    timeout_s: float = Field(300.0, gt=0.0)
    """How long the generators may take to serve a new version."""


class EvalConfig(Section):
    """Completions for held-out prompts, before the first step, after the last and every `every_steps`.

    With a judge, a completion's reward is how it fares against the first policy's for the same prompt: 1 is a win in
    both orders, 0.5 a tie."""

    prompts: PromptsConfig
    every_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations; None: only before the first step and after the last."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature; 0 is greedy. Above 0, each prompt is sampled with the same seed every time."""
    num_generations: int = Field(1, ge=1)
    """Completions per prompt."""
    pass_at: tuple[int, ...] = ()
    """Measure pass@k for each of these k: the probability that at least one of k completions gets a reward of 1 or
    more. It is measured for each reward function."""

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
    """The run: how long it is, how it samples, learns and keeps its results."""

    output_dir: Path = Path("runs")
    """Folder of all runs; a run's own folder is `output_dir/run_name`."""
    run_name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the run's folder. Starting again with the same name resumes the run."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order of the prompts and of everything else that is random in the trainer. NumPy takes 32 bits."""
    max_steps: int = Field(ge=1)
    """Steps of the run. A step is one batch of rollouts and its update."""
    max_lag: int = Field(1, ge=0)
    """Number of versions that rollouts may be behind the learner; 0 is strictly on-policy."""
    algorithm: Literal["grpo", "online_dpo"] = "grpo"
    """What computes advantages and the loss."""
    prompts: PromptsConfig = PromptsConfig()
    rewards: tuple[RewardConfig, ...] = ()
    """Reward functions. At least one, unless `online_dpo.judge` is set."""
    reward_errors: Literal["fail", "drop"] = "fail"
    """What an exception in a reward function does: it ends the run (`fail`), or leaves the row out of the update
    (`drop`)."""
    reward_timeout_s: float = Field(300.0, gt=0.0)
    """How long one call of a reward function may take. A synchronous function's wait for its turn does not count."""
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
    """Trackers that get the metrics too, besides `metrics.jsonl`. Each needs its package. `tensorboard` writes into the
    run's folder, `trackio` on this machine, `wandb` to its service (WANDB_MODE=offline: into the run's folder)."""
    max_mismatch: float = Field(0.2, gt=0.0)
    """Largest difference between trainer and generators in the logprobs of the same tokens under the same weights, in
    nats per token (a moving average). Above it the run stops: the two sides compute different models."""
    log_completions: int = Field(4, ge=0)
    """Completions per step that `rollouts.jsonl` keeps."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port where Prometheus reads the newest step (`/metrics`, with the bearer token); None: no port."""
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
            raise ValueError(
                f"rollout.num_generations is {generations}; online_dpo compares two completions, expected 2"
            )
        if generations < 2:
            raise ValueError("rollout.num_generations is 1; an advantage is relative to its group, expected 2 or more")
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
                f"eval.num_generations is {self.eval.num_generations}; a judge compares one completion per prompt with "
                "the first policy's, expected 1"
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
