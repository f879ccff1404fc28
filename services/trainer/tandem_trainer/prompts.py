"""Where prompts come from: read once, tokenized once, drawn in a seeded order that a checkpoint can go on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from .config import PromptsConfig
from .errors import UserError

Conversation = list[dict[str, Any]]

REWARD_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""What every reward function gets besides the columns."""


@dataclass(frozen=True)
class PromptRow:
    """One row of the data set, ready to be asked for."""

    index: int
    where: str
    """Source and index, for messages."""
    prompt: str | Conversation
    """As the data set has it; reward functions get it so."""
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
    rows = [_prompt_row(index, row, config, tokenizer) for index, row in enumerate(islice(_read(config), config.limit))]
    if not rows:
        raise UserError(f"{config.source} holds no rows; wanted at least one prompt in column {config.column!r}")
    return rows


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


def _read(config: PromptsConfig) -> Iterator[dict[str, Any]]:
    source = config.source
    if source.endswith((".jsonl", ".json")):
        return _read_jsonl(Path(source))
    import datasets  # slow to import and seldom needed

    datasets.disable_progress_bars()
    file_type = Path(source).suffix.removeprefix(".")
    try:
        if file_type in ("parquet", "csv"):
            return iter(datasets.load_dataset(file_type, data_files=source, split=config.split))
        return iter(datasets.load_dataset(source, config.subset, split=config.split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"prompts.source {config.source!r} cannot be loaded: {error}") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text().split("\n")  # splitlines would also split at separators inside of strings
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts.source {path} cannot be read: {error} (relative to the project's folder)") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}; wanted one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} holds {type(row).__name__}; wanted an object with the columns")
        yield row


def _prompt_row(
    index: int, row: dict[str, Any], config: PromptsConfig, tokenizer: PreTrainedTokenizerBase
) -> PromptRow:
    where = f"{config.source} row {index}"
    if config.column not in row:
        raise UserError(f"{where} has the columns {sorted(row)}; wanted {config.column!r} (trainer.prompts.column)")
    if reserved := row.keys() & REWARD_ARGUMENTS - {config.column}:
        raise UserError(
            f"{where} has the columns {sorted(reserved)}, which would hide what reward functions are called with; "
            "rename them"
        )
    prompt = row[config.column]
    if isinstance(prompt, str):
        if config.tools:
            raise UserError(f"{where}: the prompt is plain text, which no tools reach; wanted a conversation")
        text, token_ids = prompt, tokenizer(prompt).input_ids
    else:
        text = _apply_template(where, prompt, row.get("tools"), config, tokenizer)
        # The template writes the special tokens itself.
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
    if not token_ids:
        raise UserError(f"{where}: the prompt {prompt!r} has no tokens; wanted at least one")
    columns = {name: value for name, value in row.items() if name != config.column}
    return PromptRow(index, where, prompt, text, tuple(token_ids), columns)


def _apply_template(
    where: str, prompt: Any, tools: Any, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase
) -> str:
    turns = prompt if isinstance(prompt, list) else []
    if not turns or not all(isinstance(turn, dict) and "role" in turn and _says_something(turn) for turn in turns):
        raise UserError(f"{where}: the prompt is {prompt!r}; wanted a string or a list of role/content objects")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} is a conversation but the model's tokenizer has no chat template; write the prompts as plain "
            "strings or choose an instruct model"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                prompt,
                tools=_tools(where, tools) or list(config.tools) or None,
                tokenize=False,
                add_generation_prompt=True,
                **config.chat_template_kwargs,
            )
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the prompt: {error}") from error


def _says_something(turn: dict[str, Any]) -> bool:
    return "content" in turn or "tool_calls" in turn


def _tools(where: str, tools: Any) -> list[dict[str, Any]]:
    """A row's tools. As JSON text too: parquet has one type a column, and schemas differ."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the column 'tools' is no JSON: {error}; wanted a list of schemas") from error
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or []):
        raise UserError(f"{where}: the column 'tools' holds {tools!r}; wanted a list of JSON schemas of functions")
    return tools or []
