"""The table of all alerts: what each looks at, when it is raised, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from . import measures
from .measures import STEPS, Facts, Records


class Detector(NamedTuple):
    """One alert."""

    measure: Callable[[Records, Facts], float | None]
    found: str
    """What is the case: `{value}` is the figure, and `{of}` what `of` returns."""
    expected: str
    """`{limit}` is the limit."""
    first: str
    """What to do first."""
    raises_after: int = 1
    """How many steps in a row have to be beyond the limit."""
    ends_after: int = STEPS
    """How many steps in a row have to be well within it: see `calm`."""
    calm: float = 0.5
    """Share of the limit below which a figure is well within it. A lower limit is divided by it."""
    is_lower: bool = False
    """Values below the limit are beyond it."""
    level: Literal["warning", "error"] = "warning"
    of_evaluations: bool = False
    """The measure gets the records with evaluations."""
    of: Callable[[Records, Facts], str] = lambda *_: ""

    def is_beyond(self, value: float, limit: float) -> bool:
        return value <= limit if self.is_lower else value >= limit

    def is_within(self, value: float, limit: float) -> bool:
        """Whether the value is so far within the limit that the alert may end."""
        return value > limit / self.calm if self.is_lower else value < limit * self.calm

    def message(self, value: float, limit: float, records: Records, facts: Facts) -> str:
        words = {"value": f"{value:.3g}", "limit": f"{limit:g}", "of": self.of(records, facts)}
        return f"{self.found} Expected {self.expected}. First: {self.first}".format(**words)


READ = "read completions of this step in rollouts.jsonl, or with `tandem watch`"

DETECTORS: dict[str, Detector] = {
    "mismatch": Detector(
        measures.mismatch,
        "Trainer and generators compute different logprobs for the same tokens under the same weights: {value} times "
        "the difference that rounding explains. {of}",
        "less than {limit} times",
        "compare the dtypes, quantization and position encodings of both sides.",
        of=lambda _, facts: facts.mismatch_text,
    ),
    "kl_sampler": Detector(
        measures.kl_sampler,
        "The policy is far from the one that sampled the completions: kl_sampler is {value} nats per token.",
        "less than {limit}",
        "look at `mismatch`; if that is small, lower trainer.optim.learning_rate or trainer.max_lag.",
        raises_after=STEPS,
    ),
    "entropy_collapse": Detector(
        measures.entropy,
        "The policy has stopped exploring: its entropy is {value} nats per token, a mean over 10 steps, and rewards "
        "still differ.",
        "more than {limit}",
        "lower trainer.optim.learning_rate, or set trainer.grpo.epsilon_high to 0.28.",
        is_lower=True,
    ),
    "rewards_equal": Detector(
        measures.batches_without_signal,
        "In {value} batches in a row, all completions of each group have the same reward. Nothing is learned from "
        "them.",
        "less than {limit}",
        f"{READ}. If they are right, the task is solved; else make the reward finer or the prompts easier.",
        ends_after=3,
    ),
    "reward_missing": Detector(
        measures.share("reward_none_fraction"),
        "For a share of {value} of the completions, no reward function gave a reward. Nothing is learned from them.",
        "less than {limit}",
        "look why the function returns None: often it does not find the answer in the completion.",
    ),
    "reward_function_missing": Detector(
        measures.function_missing,
        "The reward function {of} returns None for a share of {value} of the completions.",
        "less than {limit}",
        "check that its columns are in the data and that it can read the completions.",
        of=measures.most_silent,
        calm=0.8,
    ),
    "truncated": Detector(
        measures.share("truncated_fraction", "completions/clipped_ratio"),
        "A share of {value} of the completions is cut off.",
        "less than {limit}",
        f"{READ}; then raise trainer.rollout.max_completion_length (or max_turns).",
    ),
    "length_explosion": Detector(
        measures.length_growth,
        "Completions are {value} times as long as some tens of steps ago.",
        "less than {limit} times",
        f"{READ}: does the reward favour length?",
        raises_after=3,
    ),
    "repetition": Detector(
        measures.share("repetitive_fraction"),
        "A share of {value} of the completions repeats the same text again and again.",
        "less than {limit}",
        f"{READ}: does the reward pay for it?",
    ),
    "grad_norm_spike": Detector(
        measures.grad_norm_growth,
        "The norm of the gradient is {value} times its median over the 20 steps before. It is clipped to "
        "trainer.optim.max_grad_norm.",
        "less than {limit} times",
        "one spike is harmless. If they come often, lower trainer.optim.learning_rate.",
        ends_after=10,
    ),
    "not_finite": Detector(
        measures.not_finite,
        "The loss or the gradient is NaN or infinite. Steps in a row: {value}.",
        "finite numbers",
        "stop the run, lower the learning rate, or train in float32.",
        level="error",
    ),
    "learning_rate_zero": Detector(
        measures.zero_learning_rate,
        "The learning rate is 0, for {value} steps now. The policy does not change.",
        "a learning rate above 0",
        "check the learning rate and its schedule (trainer.optim).",
        ends_after=1,
    ),
    "clipped": Detector(
        measures.newest("clip_ratio/region_mean"),
        "For a share of {value} of the tokens, the probability ratio is clipped.",
        "less than {limit}",
        "lower trainer.grpo.num_iterations or trainer.optim.learning_rate.",
        raises_after=STEPS,
    ),
    "kl_reference": Detector(
        measures.newest("kl_reference", "kl"),
        "The policy is far from the start policy: their KL divergence is {value} nats per token.",
        "less than {limit}",
        f"{READ}: are they still language? Then lower the learning rate or raise beta.",
        raises_after=STEPS,
    ),
    "reasked": Detector(
        measures.reasked,
        "Over the last steps, {value} groups were thrown away as too old for each one that was learned from.",
        "less than {limit}",
        "raise trainer.max_lag, or lower trainer.rollout.max_completion_length.",
    ),
    "tool_errors": Detector(
        measures.tool_errors,
        "A share of {value} of the tool calls is answered with an error, over the last 10 steps.",
        "less than {limit}",
        f"{READ}: what do the tools answer?",
        calm=0.8,
    ),
    "evaluation_falls": Detector(
        measures.evaluation_fall,
        "The reward of the evaluation is {value} of its best value below it, while the training reward rises. The "
        "policy may exploit the training reward.",
        "a fall of less than {limit}",
        f"{READ}, those with the highest reward.",
        ends_after=1,
        of_evaluations=True,
    ),
}
"""Name of the alert, of its limit, and of its section in docs/train/alerts.md."""
