"""Settings of the rollout side: prompts, rewards, and how completions are sampled.

The text below a field is its description in docs/reference/config.md.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

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
    them row by row. Nothing executes the calls."""


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
    """The completions that the generators sample in each step."""

    num_prompts: int = Field(16, ge=1)
    """Prompts per step, over all trainer processes. Must be a multiple of the number of trainer processes."""
    num_generations: int = Field(8, ge=1)
    """Completions per prompt, which form one group. At least 2; exactly 2 for Online DPO. A larger group gives a more
    precise baseline and takes more time."""
    max_completion_length: int = Field(256, ge=1)
    """Longest completion in tokens. A longer one is truncated. Prompt and completion together must fit into
    `generator.max_model_len`."""
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
    timeout_s: float = Field(600.0, gt=0.0)
    """How long the rollouts of one step may take, in seconds. Then the run stops with an error. The rewards may take as
    long again."""
    stall_timeout_s: float = Field(300.0, gt=0.0)
    """How long a replica may send nothing, in seconds. Then the missing groups are requested from the next replica."""
    environment_urls: BaseUrls = ()
    """Base URLs of the servers in which the tools and environments run, such as `http://environment:8100`. A name with
    several addresses stands for several replicas. Empty: they run in the trainer's process.
    docs/train/environment-server.md describes the servers."""
    environment_server: EnvironmentServerConfig = EnvironmentServerConfig()
    """How `python -m tandem_rollout.server` serves the environments."""
