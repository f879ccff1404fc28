"""Settings of the rollout side: prompts, rewards, and how completions are sampled.

The text below a field is its description in docs/reference/config.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..messages import TokenId
from .environment_server import EnvironmentServerConfig
from .sections import FUNCTION_NAME, BaseUrls, Section


class PromptsConfig(Section):
    """The data set with the prompts. All other columns are passed to the reward functions by name."""

    source: str = "prompts.jsonl"
    """A JSONL, JSON, CSV, TSV or parquet file, or what `datasets.load_dataset` accepts: a Hugging Face id or a
    folder."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set, such as `main` for `openai/gsm8k`. A file has no subsets."""
    split: str = "train"
    """Split of the data set, or a slice of one, such as `train[:1000]`. The rows of a single file are the split
    `train`."""
    column: str = "prompt"
    """Column with the prompt. A string is used unchanged. A conversation, which is a list of messages with `role` and
    `content`, is rendered with the chat template."""
    shuffle: bool = True
    """Draw the prompts in random order, with a new order in each epoch. The order depends on `trainer.seed` only."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, from the start. `null`: all rows."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, such as `enable_thinking: false`. The key `chat_template` replaces the template
    of the model."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of functions that the chat template offers to the model. A column `tools` in the data set replaces
    them row by row. Nothing executes the calls: `rollout.tools` names functions that are called."""


class RewardConfig(Section):
    """One reward function. The reward of a completion is the weighted sum over all functions."""

    function: str = Field(pattern=FUNCTION_NAME)
    """`module:function`, in the project's folder or in an installed package. It is called once per group with `prompts,
    completions, completion_ids, **columns`. It returns a list with one number, or None for no reward, per
    completion."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    arguments: dict[str, Any] = {}
    """More keyword arguments for the function. They must not have the name of a column."""
    timeout_s: float | None = Field(None, gt=0.0)
    """Deadline of one call in seconds. `null`: `trainer.reward_timeout_s`."""
    sandbox: bool | None = None
    """Run the function in a separate process without credentials, which is killed at the deadline. Use it for rewards
    that execute what the model wrote. `null`: the function decides, with the decorator `sandboxed`. Of the ready-made
    functions, `math_answer` does. docs/train/rewards.md describes the limits of the sandbox."""


class RolloutConfig(Section):
    """The completions that the generators sample in each step, and the episodes that they are part of."""

    num_prompts: int = Field(16, ge=1)
    """Prompts per step, over all trainer processes. Must be a multiple of the number of trainer processes."""
    num_generations: int = Field(8, ge=1)
    """Completions per prompt, which form one group. At least 2; exactly 2 for Online DPO. A larger group gives a more
    precise baseline and takes more time."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion in tokens. A longer one is truncated. Prompt and completion together must fit into
    `generator.max_model_len`. In an episode of several turns it counts everything behind the prompt: what the model
    writes, and what tools and environments say. For an agent it counts what the model writes."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature. The trainer computes its logprobs at the same temperature."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample only from the most probable tokens that together have this probability. 1: from all tokens. Leave `top_p`,
    `top_k`, `min_p` and `repetition_penalty` at their defaults if you can: they change the sampler but not the
    trainer's logprobs. Other values bias `kl_sampler` and the importance-sampling correction, and turn off the check of
    `max_mismatch`."""
    top_k: int = Field(0, ge=0)
    """Sample only from this many most probable tokens. 0: from all tokens. See `top_p`."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Sample only from tokens that have at least this fraction of the highest probability. 0: from all tokens. See
    `top_p`."""
    repetition_penalty: float = Field(1.0, gt=0.0)
    """Above 1, tokens that have already occurred become less probable. 1: no penalty. See `top_p`."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """Token ids that end a completion, in addition to the end-of-sequence tokens of the model."""
    refill: bool = False
    """Replace groups in which all completions have the same reward, from which nothing can be learned, by further
    prompts until the batch is full. This is the dynamic sampling of DAPO. A step replaces at most ten batches of
    groups; then it learns from what it has, and `events.jsonl` says so. `refilled` in `metrics.jsonl` is the number of
    groups that were replaced."""
    timeout_s: float = Field(600.0, gt=0.0)
    """How long the rollouts of one step may take after a generator serves their version, in seconds. Then the run stops
    with an error. The rewards may take as long again."""
    stall_timeout_s: float = Field(300.0, gt=0.0)
    """How long a replica may sample no token, in seconds. Then the missing groups are requested from another replica.
    A group may take longer if its tokens grow. A generator of an older release does not report tokens: with it, this is
    the longest time between two groups."""
    tools: tuple[str, ...] = ()
    """Functions of the project that the model can call, each `module:function`. They need types and a docstring that
    describes each parameter. With tools, an environment or an agent, a completion becomes an episode of several turns.
    docs/train/episodes.md describes them."""
    environment: str | dict[str, str] | None = None
    """Environment class of the project, `module:Name`, in which episodes take place. A mapping from names to classes:
    the column `environment` of the data set selects one for each row."""
    agent: str | None = Field(None, pattern=FUNCTION_NAME)
    """Agent of the project, `module:function`: code that calls the model through the OpenAI API. It replaces `tools`
    and `environment`."""
    max_turns: int = Field(8, ge=1)
    """Turns of the model in an episode. For an agent: its calls of the model."""
    max_turn_length: int | None = Field(None, ge=1)
    """Longest turn in tokens. A longer one is cut off, and the episode goes on. `null`: only `max_completion_length`
    limits it."""
    tool_timeout_s: float = Field(60.0, gt=0.0)
    """How long a call may take, in seconds. If a function of `tools` or an `async` tool of an environment takes longer,
    the model reads an error. If another method of an environment takes longer, the episode fails."""
    max_tool_characters: int = Field(8192, ge=1)
    """Longest text that the model reads from a tool or an environment at once. A longer one is cut."""
    tool_parser: str | None = None
    """How the model writes tool calls: `hermes`, `llama3`, `mistral`, or a function of the project,
    `module:function`. `null`: the tokenizer's response template, or the parser that reads what the chat template
    writes."""
    history: Literal["keep", "template"] = "keep"
    """What the model sees of its earlier turns. `keep`: what it wrote, thinking included. `template`: what the chat
    template shows of it."""
    episode_timeout_s: float = Field(240.0, gt=0.0)
    """How long an agent may take for an episode, in seconds. Then the episode fails."""
    environment_urls: BaseUrls = ()
    """Base URLs of the servers in which the tools and environments run, such as `http://environment:8100`. A name with
    several addresses stands for several replicas. Empty: they run in the trainer's process.
    docs/train/environment-server.md describes the servers."""
    environment_server: EnvironmentServerConfig = EnvironmentServerConfig()
    """How `python -m tandem_rollout.server` serves the environments."""

    @field_validator("tools", "environment")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        names = value.values() if isinstance(value, Mapping) else [value] if isinstance(value, str) else value or ()
        for name in names:
            if not re.match(FUNCTION_NAME, name):
                raise ValueError(f"got {name!r}, expected module:name, such as tools:search for search in tools.py")
        if value == {}:
            raise ValueError("got an empty mapping, expected at least one environment class")
        return value

    @model_validator(mode="after")
    def _agent_is_alone(self) -> RolloutConfig:
        others = [key for key in ("tools", "environment", "environment_urls") if getattr(self, key)]
        if self.agent and others:
            raise ValueError(
                f"both agent and {others[0]} are set, expected only one of them: an agent brings its own tools"
            )
        return self

    @property
    def has_episodes(self) -> bool:
        """Whether tools, an environment or an agent are configured. Otherwise each prompt gets a single turn."""
        return bool(self.tools or self.environment or self.agent or self.environment_urls)

    @property
    def may_give_rewards(self) -> bool:
        """Whether episodes may bring rewards of their own. Those of a server that has another project may."""
        return bool(self.environment or self.agent or (self.environment_urls and not self.tools))

    @property
    def functions(self) -> tuple[str, ...]:
        """Everything of the project that episodes use, as `module:name`."""
        environments = self.environment if isinstance(self.environment, dict) else {"": self.environment}
        named = (*self.tools, *environments.values(), self.agent, self.tool_parser)
        return tuple(name for name in named if name and ":" in name)

    @property
    def room_behind_prompt(self) -> int:
        """Tokens that must fit behind a prompt. An agent's calls are limited by what fits."""
        return 1 if self.agent else self.max_completion_length
