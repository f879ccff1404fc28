"""Load what the user brings besides the model's weights: the tokenizer, the rewards, the prompts and the episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import anyio
from transformers import PreTrainedTokenizerBase

from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig, TrainerSettings
from tandem_protocol.model_directory import check_model_directory
from tandem_protocol.problems import one_line

from .episodes import Episodes, load_episodes
from .errors import UserError
from .prompts import PromptRow, check_lengths, load_prompts
from .rewards.judge import Judge
from .rewards.scoring import Rewards

Call = Callable[..., Any]
"""Calls an asynchronous function: `anyio.run`, or `call` of the portal in whose event loop episodes will be played."""


class Inputs(NamedTuple):
    """What the user brings besides the model's weights, loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Rewards | Judge
    rows: list[PromptRow]
    eval_rows: list[PromptRow]
    episodes: Episodes | None
    """None for single turns."""

    def describe(self, settings: TrainerSettings) -> str:
        """One line about what will be trained, for the log."""
        config = settings.trainer
        evaluation = f", evaluated on {len(self.eval_rows)} prompts" if self.eval_rows else ""
        rewards = config.scorers or (f"the {'agent' if config.rollout.agent else 'environment'} itself",)
        return (
            f"training {settings.shared.model} on {len(self.rows)} prompts of {config.prompts.source}"
            f"{self._episodes(config)}, scored by {', '.join(rewards)}{evaluation}"
        )

    def _episodes(self, config: TrainerConfig) -> str:
        rollout = config.rollout
        if rollout.agent:
            return f" with the agent {rollout.agent}"
        names = [schema["function"]["name"] for schema in self.episodes.schemas] if self.episodes else []
        tools = f" with the tools {', '.join(names)}" if names else ""
        return f" in environments{tools}" if rollout.environment else tools


def load_inputs(settings: TrainerSettings, processes: int, call: Call = anyio.run, *, rank: int = 0) -> Inputs:
    """Load the tokenizer, the rewards, the prompts, and what plays episodes.

    This takes seconds, and needs no device and no generator.

    Args:
        call: calls the methods of environments that are asynchronous.
        rank: of this trainer process.

    Raises:
        ConfigError: the number of processes does not divide that of the prompts.
        UserError: the prompts, rewards, tools, environments or configuration do not fit together.
    """
    config = settings.trainer
    config.check_processes(processes)
    tokenizer = load_tokenizer(settings.shared)
    scorer = load_scorer(config)
    if config.rollout.environment_urls and isinstance(scorer, Rewards):
        scorer.check_without_objects()
    episodes = load_episodes(config, settings.shared, tokenizer, rank)
    if episodes is None:
        return _with_prompts(settings, tokenizer, scorer, None)
    try:
        call(partial(episodes.start, needs_rewards=not config.scorers))
        return _with_prompts(settings, tokenizer, scorer, episodes)
    except BaseException:
        call(episodes.close)
        raise


def _with_prompts(
    settings: TrainerSettings,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Rewards | Judge,
    episodes: Episodes | None,
) -> Inputs:
    """Load the prompts, and check that everything else fits them."""
    config = settings.trainer
    rows = load_prompts(config.prompts, tokenizer, episodes=episodes)
    eval_rows = load_prompts(config.eval.prompts, tokenizer, episodes=episodes) if config.eval else []
    scorer.check_parameters([*rows, *eval_rows])
    if episodes:
        episodes.check(config.prompts, rows)
        if config.eval:
            episodes.check(config.eval.prompts, eval_rows)
    if length := _longest(settings.shared):
        check_fit(config, [*rows, *eval_rows], length)
    return Inputs(tokenizer, scorer, rows, eval_rows, episodes)


def check_fit(config: TrainerConfig, rows: Sequence[PromptRow], max_model_len: int) -> None:
    """Refuse prompts that leave no room for an episode. An agent need not use its prompt as it is.

    Raises:
        UserError: a prompt is too long.
    """
    if not config.rollout.agent:
        check_lengths(rows, max_model_len, config.rollout.max_completion_length)


def _longest(shared: SharedConfig) -> int | None:
    """The longest row that the model can encode, in tokens. Generators refuse a larger `max_model_len`.

    None if a scaled encoding decides that, or if nothing limits it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            shared.model, revision=shared.revision, trust_remote_code=shared.trust_remote_code
        ).get_text_config(decoder=True)
    except (OSError, ValueError):  # loading the model reports it
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or any(isinstance(value, dict) for value in rope.values()):
        return None
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def load_scorer(config: TrainerConfig) -> Rewards | Judge:
    """Load the reward functions, or the judge if `online_dpo.judge` is set.

    Raises:
        UserError: one of the project's functions does not exist or cannot be imported.
    """
    drop_errors = config.reward_errors == "drop"
    timeout_s = config.reward_timeout_s
    if judge := config.online_dpo.judge:
        return Judge(judge, drop_errors=drop_errors, timeout_s=timeout_s)
    return Rewards(config.rewards, drop_errors=drop_errors, timeout_s=timeout_s)


def load_tokenizer(shared: SharedConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        UserError: the model does not exist, or its tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer  # imports torch, if it is installed

    check_model_directory(shared.model)
    try:
        return AutoTokenizer.from_pretrained(
            shared.model, revision=shared.revision, trust_remote_code=shared.trust_remote_code
        )
    except Exception as error:  # any kind: a damaged tokenizer.json fails deep inside the libraries
        raise UserError(
            f"the tokenizer of shared.model {shared.model!r} cannot be loaded: {one_line(error)}. Expected the "
            "tokenizer files of a Hugging Face model. Fix: restore these files, or choose another model."
        ) from error
