"""Stop strings in TRL's `generation_kwargs`. With its own server, TRL gets the token that completes one as the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem_protocol.config import ConfigError
from tandem_protocol.messages import Completion
from tandem_rollout.stop_strings import stopped

from .completions import all_options

CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded before a completion. Some tokenizers drop a space that begins a text."""


class StopStrings:
    """The stop strings of a call of TRL."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """
        Args:
            given: The arguments of the call.

        Raises:
            ConfigError: `stop` is not a text or a list of texts.
        """
        options = all_options(given)
        stop = options.get("stop")
        strings = [stop] if isinstance(stop, str) else stop or []
        if not isinstance(strings, list | tuple) or not all(isinstance(text, str) and text for text in strings):
            raise ConfigError(f"got stop={stop!r} in generation_kwargs, expected a text or a list of texts.")
        self._strings: Sequence[str] = strings
        self._skips_special = bool(options.get("skip_special_tokens", True))

    def __bool__(self) -> bool:
        return bool(self._strings)

    def cut(self, prompt: Sequence[int], completion: Completion, tokenizer: Any) -> Completion:
        """Return the completion up to the first token with which its text has a stop string, or all of it."""
        context = list(prompt[-CONTEXT_TOKENS:])

        def text(count: int) -> str:
            ids = [*context, *completion.token_ids[:count]]
            decoded: str = tokenizer.decode(
                ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False
            )
            return decoded

        begin = len(text(0)) if self._strings else 0
        return stopped(completion, self._strings, lambda count: text(count)[begin:])
