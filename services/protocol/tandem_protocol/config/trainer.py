"""The trainer's configuration. The text below a field is its description in docs/reference/config.md.

A key has the name of TRL's option if it has the same meaning, so that a configuration can be copied from TRL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..messages import SwitchMode
from .alerts import AlertsConfig
from .learning import GrpoConfig, LearnerConfig, LoraConfig, OnlineDpoConfig, OptimConfig
from .names import ProjectName, is_of_project, known_or_of_project
from .rollout import PromptsConfig, RewardConfig, RolloutConfig
from .sections import ConfigError, Section, SharedConfig

_Algorithm = Literal["grpo", "online_dpo"]


class CheckpointConfig(Section):
    """When checkpoints are written. A run that is started again resumes from its newest checkpoint."""

    every_steps: int = Field(20, ge=1)
    """Steps between two checkpoints. A crash loses at most this many steps."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep. Each holds the weights in float32 and the optimizer state."""
    keep_best: bool = False
    """Also write a checkpoint after each evaluation with the highest mean reward so far, and keep the last of these. It
    needs `trainer.eval.every_steps`."""


class PublishConfig(Section):
    """How new weights are published to the generators after each step."""

    mode: SwitchMode = SwitchMode.IN_FLIGHT
    """What happens to running requests. `in_flight`: they pause, and continue with the new weights. `drain`: they
    finish with the old weights before the switch. `abort`: they end at once, and their groups are requested again."""
    keep: int = Field(2, ge=1)
    """Number of newest versions to keep in the weight store. Versions that a generator uses are kept as well."""
    delta: Literal["auto", "never", "always"] = "auto"
    """Publish only what differs from the version before, which is a few percent of a bfloat16 model. `auto`: if the
    weights volume is slower than 500 MB/s and not in memory, a version has at least 64 MiB, and the machine of the main
    process has free memory for two of them. `always`: without this rule, for tests. Complete versions are published in
    between, for float32, for adapters, and if a generator refuses deltas. Deltas need space for two versions in each
    `generator.materialize_dir`, and one more copy in the trainer's memory."""
    timeout_s: float = Field(300.0, gt=0.0)
    """How long it may take until all generators serve a new version, in seconds. Then the run stops with an error.
    Raise it for large models or slow volumes."""


class EvalConfig(Section):
    """Evaluation on held-out prompts, before the first step, after the last, and every `every_steps`."""

    prompts: PromptsConfig
    """The held-out prompts, with the same keys as `trainer.prompts`. They are scored with `trainer.rewards`. A judge
    compares each completion with that of the first evaluated policy for the same prompt, in both orders: the reward is
    1 for a win, 0.5 for a tie, 0 for a loss."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations. Training waits during an evaluation. `null`: only before the first step and after
    the last."""
    temperature: float = Field(0.0, ge=0.0)
    """Sampling temperature. 0 is greedy. Above 0, a prompt has the same seed in every evaluation."""
    num_generations: int = Field(1, ge=1)
    """Completions per prompt. More than 1 needs a `temperature` above 0, and `rewards` instead of a judge."""
    pass_at: tuple[int, ...] = ()
    """Values of k for which pass@k is computed for each reward function: the probability that at least one of k
    completions has a reward of 1 or more. k is at most `num_generations`."""

    @model_validator(mode="after")
    def _samples_are_enough_and_differ(self) -> EvalConfig:
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(
                f"num_generations is {self.num_generations} at temperature 0, expected a temperature above 0: at 0, "
                "all completions of a prompt are the same"
            )
        if wrong := [k for k in self.pass_at if not 1 <= k <= self.num_generations]:
            raise ValueError(
                f"pass_at contains {wrong}, expected 1 to num_generations, which is {self.num_generations}"
            )
        return self


class TrainerConfig(Section):
    """The training run: what is trained, on which prompts, with which rewards, and for how long."""

    output_dir: Path = Path("runs")
    """Folder of all runs. The files of this run are in `output_dir/run_name`."""
    run_name: str = Field("default", pattern=r"^\w[\w.-]*$")
    """Name of the run and of its folder: letters, digits, `_`, `.` and `-`. A run that is started again with the same
    name resumes."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order of the prompts, of their sampling, and of Python, NumPy and torch in the trainer. Less than
    2^32."""
    max_steps: int = Field(ge=1)
    """Number of training steps. Each step trains on `rollout.num_prompts` groups and publishes one version. Raise it to
    continue a finished run."""
    max_lag: int = Field(1, ge=0)
    """By how many versions rollouts may be older than the weights that learn from them. 0 is strictly on-policy: the
    generators are idle during an update. With 1 or more, they sample meanwhile, and a step gets the groups that have
    finished first. Higher values help if the time for rollouts varies much from prompt to prompt or from step to step,
    and make the data more off-policy."""
    algorithm: Annotated[_Algorithm | ProjectName, known_or_of_project(_Algorithm)] = "grpo"
    """`grpo` learns from rewards, `online_dpo` from preferences between two completions. `module:Class` is an algorithm
    of your project: docs/integrate/losses.md."""
    algorithm_arguments: dict[str, Any] = {}
    """More keyword arguments for an `algorithm` of your project."""
    prompts: PromptsConfig = PromptsConfig()
    """The prompts to train on."""
    rewards: tuple[RewardConfig, ...] = ()
    """List of reward functions. At least one, unless `rollout.environment` or `rollout.agent` gives rewards. Only
    `online_dpo` can have a judge instead (`online_dpo.judge`)."""
    reward_errors: Literal["fail", "drop"] = "fail"
    """What to do if a reward function or judge raises, times out, or returns something invalid. `fail`: stop the run.
    `drop`: log a warning and leave the group out of the update. A synchronous function that times out cannot be
    stopped, so it ends the run in both cases, unless it runs in a sandbox."""
    reward_timeout_s: float = Field(300.0, gt=0.0)
    """How long one call of a reward function or judge may take, in seconds. Synchronous functions run one at a time;
    the wait for others does not count."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled."""
    grpo: GrpoConfig = GrpoConfig()
    """Options of `algorithm: grpo`."""
    online_dpo: OnlineDpoConfig = OnlineDpoConfig()
    """Options of `algorithm: online_dpo`."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    learner: LearnerConfig = LearnerConfig()
    """Precision, memory and parallelism of an update."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter. `null`: train all parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and which are kept."""
    publish: PublishConfig = PublishConfig()
    """How generators switch to new weights."""
    eval: EvalConfig | None = None
    """Evaluation on held-out prompts. `null`: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that also receive the numbers of `metrics.jsonl`. Each needs its Python package. `tensorboard` writes to
    the run's folder, `trackio` to this machine, `wandb` to its service (with `WANDB_MODE=offline`: to the run's
    folder)."""
    max_mismatch: float = Field(0.2, gt=0.0)
    """Largest mean difference between the logprobs of trainer and generators for the same tokens and weights, in nats
    per token (a moving average). Above it the run stops, because the two sides compute different models. Look for the
    cause before you raise it."""
    alerts: AlertsConfig | None = AlertsConfig()
    """Limits of the alerts that a run raises about its own figures (docs/train/alerts.md). `null`: no alerts."""
    log_completions: int = Field(4, ge=0)
    """Number of completions per step that are written to `rollouts.jsonl`, with their rewards. 0: none."""
    log_tokens: int = Field(2048, ge=0)
    """Number of sampled tokens of each of them that are written with their logprobs: about 30 bytes per token. Further
    tokens are only in the text. 0: none."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on which Prometheus can scrape the metrics of the newest step (`GET /metrics`, with the bearer token).
    `null`: no port."""
    start_timeout_s: float = Field(900.0, gt=0.0)
    """How long to wait at the start until all generators are ready, in seconds. Raise it for models that load
    slowly."""

    @model_validator(mode="after")
    def _best_is_known(self) -> TrainerConfig:
        if self.checkpoint.keep_best and (self.eval is None or self.eval.every_steps is None):
            raise ValueError(
                "checkpoint.keep_best is true without eval.every_steps, expected evaluations to find the best"
            )
        return self

    @model_validator(mode="after")
    def _groups_can_be_compared(self) -> TrainerConfig:
        generations = self.rollout.num_generations
        compares_two = self.algorithm == "online_dpo" or (self.online_dpo.judge and self.algorithm != "grpo")
        if compares_two and generations != 2:
            raise ValueError(
                f"rollout.num_generations is {generations}, expected 2: online_dpo compares two completions"
            )
        if generations < 2 and self.algorithm == "grpo" and not self.grpo.advantage:
            raise ValueError("rollout.num_generations is 1, expected 2 or more: an advantage is relative to its group")
        return self

    @model_validator(mode="after")
    def _cispo_has_a_cap(self) -> TrainerConfig:
        if self.algorithm == "grpo" and self.grpo.loss_type == "cispo" and self.grpo.upper_epsilon < 1:
            given = "null" if self.grpo.epsilon_high is None else self.grpo.epsilon_high
            raise ValueError(
                f"grpo.epsilon_high is {given} for loss_type cispo, expected 1 or more: it is the largest ratio "
                "itself, and that of an unchanged policy, 1, must not be capped. Fix: set grpo.epsilon_high: 5.0"
            )
        return self

    @model_validator(mode="after")
    def _arguments_have_a_class(self) -> TrainerConfig:
        if self.algorithm_arguments and not is_of_project(self.algorithm):
            raise ValueError(
                f"algorithm_arguments is set for algorithm {self.algorithm}, expected module:Class of the project"
            )
        return self

    @model_validator(mode="after")
    def _rewards_or_judge_are_given(self) -> TrainerConfig:
        judge = self.online_dpo.judge
        if judge and self.algorithm == "grpo":
            raise ValueError(f"online_dpo.judge is {judge!r}, but algorithm is {self.algorithm}, expected online_dpo")
        if judge and self.rewards:
            raise ValueError("both rewards and online_dpo.judge are set, expected only one of them")
        if not judge and not self.rewards and not self.rollout.may_give_rewards:
            raise ValueError(
                "rewards is empty, expected at least one, online_dpo.judge with algorithm online_dpo, or a "
                "rollout.environment or rollout.agent that gives rewards"
            )
        if judge and self.eval and self.eval.num_generations > 1:
            raise ValueError(
                f"eval.num_generations is {self.eval.num_generations}, expected 1: a judge compares one completion per "
                "prompt with that of the first policy"
            )
        return self

    def check_processes(self, processes: int) -> None:
        """Check that every trainer process gets the same number of prompts.

        Raises:
            ConfigError: they do not.
        """
        if self.rollout.num_prompts % processes:
            raise ConfigError(
                f"trainer.rollout.num_prompts is {self.rollout.num_prompts} for {processes} trainer processes, "
                "expected a multiple of the number of processes. Fix: change one of them."
            )

    @model_validator(mode="after")
    def _tools_come_from_one_place(self) -> TrainerConfig:
        for prompts, key in ((self.prompts, "prompts"), (self.eval and self.eval.prompts, "eval.prompts")):
            if prompts and prompts.tools and self.rollout.has_episodes:
                raise ValueError(
                    f"{key}.tools is set together with rollout.tools, rollout.environment or rollout.agent, expected "
                    "only one of them. Fix: remove the schemas; those of the functions are made from their types."
                )
        return self

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the reward functions, or of the judge. Empty if only the environment or the agent gives rewards."""
        judge = self.online_dpo.judge
        return tuple(reward.function for reward in self.rewards) or ((judge,) if judge else ())

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of all functions and classes of the project that the run uses."""
        learning = (self.algorithm, self.grpo.loss_type, self.grpo.advantage or "", self.online_dpo.loss_type)
        return (*self.scorers, *self.rollout.functions, *filter(is_of_project, learning))

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.run_name


class TrainerSettings(Section):
    """The sections of the configuration that the trainer reads."""

    shared: SharedConfig
    trainer: TrainerConfig
