"""Where prompts come from: read once, tokenized once, drawn in a seeded order that a checkpoint can go on with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .chat_template import Rendered, render
from .config import PromptsConfig
from .conversations import Conversation, parse_prompt, parse_tools
from .data_files import read_rows
from .errors import UserError
from .text_files import Row

log = logging.getLogger(__name__)

REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""What every reward function gets besides the columns."""


@dataclass(frozen=True)
class PromptRow:
    """One row of the data set, ready to be asked for."""

    index: int
    where: str
    """Source and index, for messages."""
    prompt: str | Conversation
    """Reward functions get it so; the messages of a conversation have one shape (conversations.py)."""
    text: str
    """As the model sees it, chat template applied."""
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    """All other columns."""


class Draw(NamedTuple):
    """One prompt of one step."""

    row: int
    seed: int


def load_prompts(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> list[PromptRow]:
    """Read and tokenize the whole data set.

    Raises:
        UserError: there is no such data set, it is empty, or a row has no prompt; names the row.
    """
    data = read_rows(config)
    rows = [
        _prompt_row(index, row, config, tokenizer, nulls_are_absent=data.nulls_are_absent)
        for index, row in enumerate(islice(data.rows, config.limit))
    ]
    if not rows:
        raise UserError(f"{config.source} holds no rows; expected at least one prompt in column {config.column!r}")
    if incomplete := [(row, left_out) for row, left_out in rows if left_out]:
        row, left_out = incomplete[0]
        log.warning(
            "%s: the model's chat template leaves out message %d, %r; %d of %d prompts lack a message",
            row.where,
            left_out[0],
            row.prompt[left_out[0]],
            len(incomplete),
            len(rows),
        )
    return [row for row, _ in rows]


def check_lengths(rows: Sequence[PromptRow], max_model_len: int, max_completion_length: int) -> None:
    """Refuse prompts that leave no room for a completion.

    Raises:
        UserError: names the first such row and says how many there are.
    """
    limit = max_model_len - max_completion_length
    if long := [row for row in rows if len(row.token_ids) > limit]:
        raise UserError(
            f"{long[0].where}: the prompt has {len(long[0].token_ids)} tokens, and {len(long)} rows have too many; "
            f"wanted at most {limit}, the model's length {max_model_len} − rollout.max_completion_length "
            f"{max_completion_length}. "
            "Shorten the prompts, lower max_completion_length, or raise generator.max_model_len."
        )


class PromptCursor:
    """Draws rows of one rank, epoch after epoch, each epoch in its own seeded order.

    `position` is its whole state: the draws that follow are a function of it, the seed and the rank.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        self.position = 0
        """Prompts drawn so far by this rank."""
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._rank, self._world_size = rank, world_size

    def draw(self, count: int) -> list[Draw]:
        positions = range(self.position, self.position + count)
        self.position += count
        return [self._draw(position * self._world_size + self._rank) for position in positions]

    def _draw(self, ordinal: int) -> Draw:
        epoch, place = divmod(ordinal, self._size)
        row = self._order(epoch)[place] if self._shuffle else place
        state = np.random.SeedSequence((self._seed, ordinal)).generate_state(1, np.uint64)
        return Draw(row=int(row), seed=int(state[0] >> np.uint64(16)))

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._size)


def _prompt_row(
    index: int, row: Row, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, nulls_are_absent: bool
) -> tuple[PromptRow, tuple[int, ...]]:
    """The row, and which of its messages the chat template leaves out."""
    where = f"{config.source} row {index}"
    if config.column not in row:
        raise UserError(
            f"{where} has the columns {sorted(row)}, expected {config.column!r}. Fix: set trainer.prompts.column"
        )
    if reserved := row.keys() & REWARD_ARGUMENTS - {config.column}:
        raise UserError(
            f"{where} has the columns {sorted(reserved)}, which are names of what reward functions are called with. "
            "Fix: rename them"
        )
    prompt = parse_prompt(where, row[config.column], nulls_are_absent=nulls_are_absent)
    left_out: tuple[int, ...] = ()
    if isinstance(prompt, str):
        if config.tools:
            raise UserError(
                f"{where}: the prompt is plain text, which no tools reach; expected a conversation, because "
                "trainer.prompts.tools is set"
            )
        text = prompt
        token_ids = _begun(_token_ids(where, text, tokenizer), _opening(tokenizer))
    else:
        tools = parse_tools(where, row.get("tools"), nulls_are_absent=nulls_are_absent) or config.tools
        text, left_out = _render(where, prompt, tools, config, tokenizer)
        token_ids = _token_ids(where, text, tokenizer)
    if not token_ids:
        raise UserError(f"{where}: the prompt {prompt!r} has no tokens; expected at least one")
    columns = {name: value for name, value in row.items() if name != config.column}
    return PromptRow(index, where, prompt, text, token_ids, columns), left_out


def _render(
    where: str,
    messages: Conversation,
    tools: Sequence[Mapping[str, Any]],
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Rendered:
    if tokenizer.chat_template is None and "chat_template" not in config.chat_template_kwargs:
        raise UserError(
            f"{where} is a conversation, but the model's tokenizer has no chat template. Fix: write the prompts as "
            "plain strings, choose an instruct model, or set trainer.prompts.chat_template_kwargs: {chat_template: …}"
        )
    return render(where, messages, tools, tokenizer, config.chat_template_kwargs)


def _token_ids(where: str, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a text, without those that the tokenizer would put around it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the prompt has a lone surrogate, {text[error.start]!r}, after "
            f"{text[max(0, error.start - 20) : error.start]!r}; expected Unicode text. Fix: remove it. A text that was "
            "cut inside of an emoji has one"
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


@functools.lru_cache(maxsize=1)
def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text, such as BOS. What it puts behind one would end the prompt."""
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def _begun(token_ids: tuple[int, ...], opening: tuple[int, ...]) -> tuple[int, ...]:
    """With the opening, which a text may already have."""
    return token_ids if token_ids[: len(opening)] == opening else opening + token_ids
