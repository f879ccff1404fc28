"""Read `generator.mock.script`, a table of turns, and choose the scripted turn that answers a prompt.

The mock keeps no state for this. A turn is over when its text is part of the prompt, so repeated requests, several
replicas and a restart change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tandem_protocol.config import ConfigError
from tandem_protocol.config.reading import read_document
from tandem_protocol.config.values import typed
from tandem_protocol.errors import BadRequest
from tandem_protocol.messages import TokenId
from tandem_protocol.problems import LONGEST_VALUE, shorten, summarize

from .script_tokens import ScriptTokens

KEY = "generator.mock.script"

TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]
Text = str | TokenIds
"""Text, or its token ids."""
Turns = Annotated[tuple[Text, ...], Field(min_length=1)]
"""What the model says, one item per turn."""


class ScriptRow(BaseModel):
    """One row of the script: which prompts it is for, and the turns that answer them.

    A row with neither `prompt` nor `regex` is for every prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text | None = None
    """Text that the prompt contains."""
    regex: str | None = None
    """Regular expression that is found in the prompt."""
    turns: Turns | Literal["random"] | None = None
    """What the model says, one item per turn. `random`: the mock's own tokens."""
    samples: Annotated[tuple[Turns, ...], Field(min_length=1)] | None = None
    """Several lists of turns instead of one. The completions of a prompt take them in order."""

    @model_validator(mode="after")
    def _is_complete(self) -> ScriptRow:
        if self.prompt is not None and self.regex is not None:
            raise ValueError("got both prompt and regex, expected at most one of them")
        if (self.turns is None) == (self.samples is None):
            got = "neither turns nor samples" if self.turns is None else "both turns and samples"
            raise ValueError(f"got {got}, expected one of them")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex: got {self.regex!r}, expected a regular expression: {error}") from error
        return self


class _Turn(NamedTuple):
    """One turn, as text to find it in a prompt and as tokens to sample it."""

    text: str
    token_ids: tuple[int, ...]


class _Row(NamedTuple):
    """A row that is ready to answer. A row with `turns: random` has no samples."""

    prompt: str | re.Pattern[str]
    samples: tuple[tuple[_Turn, ...], ...]

    def end_in(self, prompt: str) -> int | None:
        """Return where the row's text ends in `prompt`. None if the row is for other prompts."""
        if isinstance(self.prompt, str):
            start = prompt.find(self.prompt)
            return None if start < 0 else start + len(self.prompt)
        found = self.prompt.search(prompt)
        return found and found.end()

    def turn(self, rest: str, number: int) -> _Turn | None:
        """Return the turn that follows those in `rest`. None if the row has no turn left.

        Args:
            rest: The prompt behind the row's text.
            number: Number of the completion. It chooses among the samples that begin with the turns in `rest`.
        """
        over = [_turns_in(rest, sample) for sample in self.samples]
        most = max(over)
        left = [sample for count, sample in zip(over, self.samples, strict=True) if count == most < len(sample)]
        return left[number % len(left)][most] if left else None


def _turns_in(text: str, turns: Sequence[_Turn]) -> int:
    """Return how many of the first turns are in `text`, in their order."""
    end = 0
    for count, turn in enumerate(turns):
        start = text.find(turn.text, end)
        if start < 0:
            return count
        end = start + len(turn.text)
    return len(turns)


class Script:
    """A script for one model.

    Args:
        rows: The rows. The first one that is for a prompt and has a turn left answers it.
        tokens: The tokens of the model.

    Raises:
        ConfigError: A row does not fit the model.
    """

    def __init__(self, rows: Sequence[ScriptRow], tokens: ScriptTokens) -> None:
        self._tokens = tokens
        self.ends = tokens.ends
        """Tokens that end a turn."""
        self._rows = [self._compiled(row, f"{KEY}, row {number}") for number, row in enumerate(rows, 1)]

    def _compiled(self, row: ScriptRow, where: str) -> _Row:
        prompt: str | re.Pattern[str] = self._tokens.searched(row.prompt or "", where)
        if row.regex is not None:
            prompt = re.compile(self._tokens.searched(row.regex, where))
        samples = row.samples or ((row.turns,) if isinstance(row.turns, tuple) else ())
        return _Row(prompt, tuple(tuple(self._turn(turn, where) for turn in turns) for turns in samples))

    def _turn(self, turn: Text, where: str) -> _Turn:
        token_ids = self._tokens.turn(turn, where)
        return _Turn(self._tokens.text(token_ids), token_ids)

    def answer(self, prompt: Sequence[int], number: int) -> tuple[int, ...]:
        """Return the tokens of the turn that answers a prompt. Empty: the mock's own tokens answer it.

        Args:
            prompt: Token ids of the prompt.
            number: Number of the completion. It chooses one of `samples`.

        Raises:
            BadRequest: No row answers this prompt.
        """
        text = self._tokens.text(prompt)
        used_up = []
        for position, row in enumerate(self._rows, 1):
            end = row.end_in(text)
            if end is None:
                continue
            if not row.samples:
                return ()
            if turn := row.turn(text[end:], number):
                return turn.token_ids
            used_up.append(str(position))
        got = shorten(text if self._tokens.has_text else list(prompt))
        matching = f"all turns of row {' and '.join(used_up)} are in it already" if used_up else "no row is for it"
        raise BadRequest(
            f"{KEY} has no turn for the prompt {got}: {matching}. Fix: add the row or the turn, or add the last row "
            '{"turns": "random"} for all other prompts.'
        )


def read_script(path: Path) -> tuple[ScriptRow, ...]:
    """Read the rows of a script: a JSONL file, or a YAML file with a list.

    Raises:
        ConfigError: The file cannot be read, or a row is invalid.
    """
    if path.suffix not in (".jsonl", ".yaml", ".yml"):
        raise ConfigError(f"{KEY}: got {path}, expected a file whose name ends in .jsonl or .yaml")
    rows = _json_lines(path) if path.suffix == ".jsonl" else _yaml_items(path)
    if not rows:
        raise ConfigError(f"{KEY}: {path} has no rows, expected at least one")
    return tuple(_row(value, f"{KEY}: {path}, row {number}") for number, value in enumerate(rows, 1))


def _row(value: Any, where: str) -> ScriptRow:
    try:
        return ScriptRow.model_validate(typed(value, ScriptRow))
    except ValidationError as error:
        raise ConfigError(f"{where}: {summarize(error.errors())}") from error
    except ValueError as error:  # YAML whose words could mean two things
        raise ConfigError(f"{where}: {error}") from error


def _json_lines(path: Path) -> list[Any]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{KEY}: {path} cannot be read: {problem}. Fix: check the path and the file.") from error
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            got = line[:LONGEST_VALUE]
            raise ConfigError(f"{KEY}: {path}, line {number}: got {got!r}, expected JSON: {error.msg}") from error
    return rows


def _yaml_items(path: Path) -> list[Any]:
    rows = read_document(path)
    if not isinstance(rows, list):
        raise ConfigError(f"{KEY}: {path} contains {shorten(rows)}, expected a list of rows")
    return rows
