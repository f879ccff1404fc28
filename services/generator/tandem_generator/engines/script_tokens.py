"""Text and tokens of a script: the tokenizer of the model, or token ids where the model has no folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tandem_protocol.config import ConfigError
from tandem_protocol.problems import one_line, shorten


class ScriptTokens:
    """Converts between text and token ids.

    Without a tokenizer, one character of the text stands for one token. Only token ids can be written then.

    Args:
        directory: Directory of the model. None: the mock has none.
        vocab_size: Size of the vocabulary. Token ids must be smaller.
        eos_token_id: Token that ends a turn if the tokenizer names no other one.

    Raises:
        ConfigError: The tokenizer cannot be read.
    """

    def __init__(self, directory: Path | None, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = _tokenizer(directory)
        self._vocab_size = vocab_size
        self._end = eos_token_id
        if self._tokenizer and directory and (named := _eos_token(directory)):
            found = self._tokenizer.token_to_id(named)
            self._end = eos_token_id if found is None else found
        configured = _configured_ends(directory) if directory else ()
        self.ends = frozenset({eos_token_id, self._end, *configured})
        """Tokens that end a turn."""

    @property
    def has_text(self) -> bool:
        """Whether the model has a tokenizer."""
        return self._tokenizer is not None

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        if self._tokenizer is None:
            return "".join(map(chr, token_ids))
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def searched(self, text: str | Sequence[int], where: str) -> str:
        """Return the text to search for in a prompt.

        Raises:
            ConfigError: It cannot be in a prompt of this model.
        """
        if not isinstance(text, str):
            return self.text(self._checked(text, where))
        if text and self._tokenizer is None:
            raise _no_tokenizer(text, where)
        return text

    def turn(self, turn: str | Sequence[int], where: str) -> tuple[int, ...]:
        """Return the tokens of a turn. The token that ends it is added if it is missing.

        Raises:
            ConfigError: The tokenizer cannot write the turn, or a token is not in the vocabulary.
        """
        token_ids = self._encoded(turn, where) if isinstance(turn, str) else tuple(turn)
        if not token_ids or token_ids[-1] not in self.ends:
            token_ids = (*token_ids, self._end)
        return self._checked(token_ids, where)

    def _encoded(self, text: str, where: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise _no_tokenizer(text, where)
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if (written := self.text(token_ids)).strip() != text.strip():
            raise ConfigError(
                f"{where}: the model's tokenizer turns {shorten(text)} into {shorten(written)}, expected the same "
                "text. Fix: use characters that the model has, or write the turn as a list of token ids."
            )
        return token_ids

    def _checked(self, token_ids: Sequence[int], where: str) -> tuple[int, ...]:
        if (largest := max(token_ids)) >= self._vocab_size:
            raise ConfigError(
                f"{where}: got token id {largest}, expected ids below the vocabulary's size {self._vocab_size}. Fix: "
                "use this model's tokens, or set generator.mock.vocab_size."
            )
        return tuple(token_ids)


def _no_tokenizer(text: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: got the text {shorten(text)}, but shared.model is not a folder with a tokenizer.json. Fix: name the "
        "model's folder, or write token ids: [5, 6, 7]."
    )


def _tokenizer(directory: Path | None) -> Tokenizer | None:
    path = directory / "tokenizer.json" if directory else None
    if path is None or not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other type
        raise ConfigError(f"shared.model: {path} cannot be read: {one_line(error)}. Fix: restore the file.") from error


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _eos_token(directory: Path) -> str | None:
    """Return the text of the token that ends a turn. Older files describe it with an object."""
    token = _read_json(directory / "tokenizer_config.json").get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _configured_ends(directory: Path) -> Iterator[int]:
    for name in ("config.json", "generation_config.json"):
        ends = _read_json(directory / name).get("eos_token_id")
        yield from ends if isinstance(ends, list) else () if ends is None else (ends,)
