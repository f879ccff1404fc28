"""The prompts of a run: read and tokenized once, then drawn in a seeded order that a resumed run continues."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from tandem_protocol.config.rollout import PromptsConfig
from tandem_protocol.once import warn_once

from .chat_template import render
from .conversations import Conversation, parse_prompt, parse_tools, shown
from .data_files import read_rows
from .errors import UserError
from .text_files import Row

log = logging.getLogger(__name__)

REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""The arguments that every reward function gets in addition to the columns."""


@dataclass(frozen=True)
class PromptRow:
    """One row of the data set with its tokenized prompt."""

    index: int
    where: str
    """Source and index, for messages."""
    prompt: str | Conversation
    """The prompt as reward functions get it. A conversation's messages are normalized (conversations.py)."""
    text: str
    """The prompt as the model sees it, with the chat template applied."""
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    """All other columns."""


class Offers(Protocol):
    """What a prompt offers to the model, such as `episodes.Episodes`."""

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools."""

    @property
    def brings_tools(self) -> bool:
        """Whether they are the only tools. Otherwise a column `tools` may bring others."""


class Draw(NamedTuple):
    """A row that was drawn for a step, and the seed for sampling its completions."""

    row: int
    seed: int


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, episodes: Offers | None = None
) -> list[PromptRow]:
    """Read and tokenize the data set.

    Args:
        episodes: the episodes that begin with these prompts. Text then becomes a message of the user.

    Raises:
        UserError: the data set does not exist, it is empty, or a row has no valid prompt. The message names the row.
    """
    data = read_rows(config)
    reader = _Reader(config, tokenizer, nulls_are_absent=data.nulls_are_absent, episodes=episodes)
    rows = [reader.read(index, row) for index, row in enumerate(islice(data.rows, config.limit))]
    if not rows:
        raise UserError(f"{config.source} has no rows, expected at least one prompt in column {config.column!r}")
    if reader.incomplete:
        message = f"{reader.incomplete[0]}; {len(reader.incomplete)} of {len(rows)} prompts lack a message"
        warn_once(log, message)
    return rows


def check_lengths(rows: Sequence[PromptRow], max_model_len: int, max_completion_length: int) -> None:
    """Refuse prompts that leave no room for a completion.

    Raises:
        UserError: a prompt is too long. The message names the first one and says how many there are.
    """
    limit = max_model_len - max_completion_length
    if long := [row for row in rows if len(row.token_ids) > limit]:
        raise UserError(
            f"{long[0].where}: the prompt has {len(long[0].token_ids)} tokens, expected at most {limit} (the model's "
            f"length {max_model_len} − rollout.max_completion_length {max_completion_length}). {len(long)} of "
            f"{len(rows)} rows have too many. Fix: shorten the prompts, lower rollout.max_completion_length, or raise "
            "generator.max_model_len."
        )


class PromptCursor:
    """Draws the rows of one rank, epoch after epoch. Each epoch has its own seeded order.

    `position` is the complete state: together with the seed and the rank it determines all following draws.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.position = 0
        """Number of prompts that this rank has drawn so far."""
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size

    def draw(self, count: int) -> list[Draw]:
        """Draw the next `count` rows."""
        positions = range(self.position, self.position + count)
        self.position += count
        return [self._draw(position * self._world_size + self._rank) for position in positions]

    def _draw(self, ordinal: int) -> Draw:
        epoch, place = divmod(ordinal, self._size)
        row = _order(self._seed, epoch, self._size)[place] if self._shuffle else place
        state = np.random.SeedSequence((self._seed, ordinal)).generate_state(1, np.uint64)
        return Draw(row=int(row), seed=int(state[0] >> np.uint64(16)))


@functools.lru_cache(2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray[Any, Any]:
    """The rows in the order of an epoch. The last ones are kept: a million rows take 20 ms."""
    return np.random.default_rng((seed, epoch)).permutation(size)


class _Reader:
    """Turns the rows of one data set into prompts."""

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        nulls_are_absent: bool,
        episodes: Offers | None,
    ) -> None:
        self.incomplete: list[str] = []
        """Messages that the chat template left out: one line for each row with such a message."""
        self._config = config
        self._tokenizer = tokenizer
        self._nulls_are_absent = nulls_are_absent
        self._episodes = episodes
        self._opening = _opening(tokenizer)

    def read(self, index: int, row: Row) -> PromptRow:
        where = f"{self._config.source} row {index}"
        column = self._config.column
        if column not in row:
            raise UserError(f"{where} has the columns {sorted(row)}, expected {column!r}. Fix: set prompts.column.")
        if reserved := row.keys() & REWARD_ARGUMENTS - {column}:
            raise UserError(
                f"{where} has the columns {sorted(reserved)}, but reward functions have parameters with these names. "
                "Fix: rename the columns."
            )
        prompt = parse_prompt(where, row[column], nulls_are_absent=self._nulls_are_absent)
        if self._episodes and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            text = prompt
            token_ids = self._plain(where, prompt)
        else:
            text = self._rendered(where, prompt, self._offered(where, row.get("tools")))
            token_ids = self._token_ids(where, text)
        if not token_ids:
            raise UserError(f"{where}: the prompt {shown(prompt)} has no tokens, expected at least one")
        columns = {name: value for name, value in row.items() if name != column}
        return PromptRow(index, where, prompt, text, token_ids, columns)

    def _plain(self, where: str, text: str) -> tuple[int, ...]:
        """Tokenize plain text. The tokens that the tokenizer puts before a text (BOS) appear exactly once."""
        if self._config.tools:
            raise UserError(
                f"{where}: the prompt is plain text, expected a conversation, because prompts.tools is set and only a "
                "chat template can show tools to the model."
            )
        token_ids = self._token_ids(where, text)
        return token_ids if token_ids[: len(self._opening)] == self._opening else self._opening + token_ids

    def _offered(self, where: str, tools: Any) -> Sequence[dict[str, Any]]:
        """Return the schemas of the tools that the chat template offers to the model."""
        if self._episodes and self._episodes.brings_tools:
            if tools:
                raise UserError(
                    f"{where} has a column 'tools', but trainer.rollout.tools or environment brings the tools. Fix: "
                    "remove or rename the column."
                )
            return self._episodes.schemas
        return parse_tools(where, tools, nulls_are_absent=self._nulls_are_absent) or self._config.tools

    def _rendered(self, where: str, messages: Conversation, tools: Sequence[dict[str, Any]]) -> str:
        template_kwargs = self._config.chat_template_kwargs
        if self._tokenizer.chat_template is None and "chat_template" not in template_kwargs:
            raise UserError(
                f"{where} is a conversation, but the model's tokenizer has no chat template. Fix: "
                f"{'' if self._episodes else 'write the prompts as plain strings, '}choose an instruct model, or set "
                "prompts.chat_template_kwargs: {chat_template: …}."
            )
        text, left_out = render(where, messages, tools, self._tokenizer, template_kwargs)
        if left_out:
            message = messages[left_out[0]]
            self.incomplete.append(
                f"{where}: the model's chat template leaves out message {left_out[0]}, {shown(message)}"
            )
        return text

    def _token_ids(self, where: str, text: str) -> tuple[int, ...]:
        """Tokenize a text without special tokens around it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            before = text[max(0, error.start - 20) : error.start]
            raise UserError(
                f"{where}: the prompt has a lone surrogate, {text[error.start]!r}, after {before!r}, expected Unicode "
                "text. Fix: remove it. It often comes from cutting a text in the middle of an emoji."
            ) from error
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text, such as BOS.

    Tokens that it puts after a text, such as EOS, are not used, because they would end the prompt.
    """
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    enclosed = list(tokenizer("a", add_special_tokens=True).input_ids)
    starts = (start for start in range(len(enclosed)) if enclosed[start : start + len(bare)] == bare)
    return tuple(enclosed[: next(starts, 0)])
