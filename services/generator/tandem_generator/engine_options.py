"""Convert `generator.vllm` to arguments of `vllm serve`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tandem_protocol.config import ConfigError


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Convert options to words for vLLM's command line.

    `{max_num_seqs: 64, foo: true, bar: false, baz: [1, 2]}` gives `--max-num-seqs 64 --foo --no-bar --baz 1 2`.
    Mappings, and lists inside lists, become JSON. Options with the value None are left out.

    Raises:
        ConfigError: An option has an empty list.
    """
    words: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            words.append(f"--no-{option[2:]}")
        elif value is True:
            words.append(option)
        elif value == []:
            raise ConfigError(f"generator.vllm.{name}: got an empty list; expected items. Fix: leave the key out.")
        elif value is not None:
            words += [option, *(_word(item) for item in (value if isinstance(value, list) else [value]))]
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def names_of(words: Iterable[str]) -> list[str]:
    """Return vLLM's names of the long options: `--max-num-seqs=1`, `--no-enforce-eager` and `--a.b` are options."""
    options = [word[2:].partition("=")[0].partition(".")[0] for word in words if word.startswith("--")]
    return [option.replace("-", "_").removeprefix("no_") for option in options]
