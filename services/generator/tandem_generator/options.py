"""The command line: `trl vllm-serve`'s options, the YAML's keys, and everything else for `vllm serve`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.config import SECTIONS, ConfigError, load, parse_overrides

from .config import GeneratorConfig, Settings
from .engine_options import as_words, names_of, refuse_owned

_SHARED = ("model", "revision", "trust_remote_code", "weights_dir")
_FLAGS = {"trust_remote_code", "enforce_eager", "enable_prefix_caching"}
_SHORT = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp"}
"""vLLM's own short forms."""
_NESTED = {"vllm", "env", "mock"}


class Options(NamedTuple):
    """What the command line asked for."""

    settings: Settings
    sources: dict[str, str]
    engine_args: list[str]
    """For vLLM's own parser, which knows and checks them."""
    project: Path | None
    """Folder of the YAML file."""
    check: bool


def parse(argv: Sequence[str]) -> Options:
    """Read the command line, the YAML and the environment.

    Raises:
        ConfigError: they do not fit the configuration's models.
    """
    args, rest = _parser().parse_known_args([_hyphens(word) for word in argv])
    overrides: dict[str, Any] = {
        f"{'shared' if name in _SHARED else 'generator'}.{name}": value
        for name, value in vars(args).items()
        if value is not None and name not in {"config", "check"}
    }
    dotted, rest = _split_dotted(rest)
    by_key = parse_overrides(dotted)
    if twice := sorted(overrides.keys() & by_key.keys()):
        raise ConfigError(f"got {twice[0]} twice on the command line, as --{twice[0]} too; expected one of the two")
    settings, sources = load(Settings, path=args.config, overrides=overrides | by_key)
    if rest and settings.generator.engine == "mock":
        raise ConfigError(f"got {' '.join(rest)}; the mock engine takes no further engine arguments")
    refuse_owned(settings.generator.vllm)
    refuse_owned(names_of(rest))
    engine_args = [*as_words(settings.generator.vllm), *rest]
    project = args.config.resolve().parent if args.config else None
    return Options(settings, sources, engine_args, project, args.check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tandem_generator",
        description="Serve rollouts. Any other option goes to `vllm serve`; --generator.KEY VALUE sets a YAML key.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="the project's config.yaml")
    parser.add_argument("--check", action="store_true", help="print the resolved configuration and exit")
    for name in (*_SHARED, *(n for n in GeneratorConfig.model_fields if n not in _NESTED)):
        option = f"--{name.replace('_', '-')}"
        if name in _FLAGS:
            # Bare or with --no- as in vLLM, or with a value as in TRL.
            parser.add_argument(option, nargs="?", const="true")
            parser.add_argument(f"--no-{option[2:]}", dest=name, action="store_const", const="false")
        else:
            parser.add_argument(option, *([_SHORT[name]] if name in _SHORT else []))
    return parser


def _hyphens(word: str) -> str:
    """`--max_model_len=1` → `--max-model-len=1`; dotted keys and values stay as they are."""
    match = re.match(r"--[A-Za-z][\w-]*(?==|$)", word)
    return match[0].replace("_", "-") + word[match.end() :] if match else word


def _split_dotted(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of `--generator.a.b VALUE` and `--shared.a=VALUE`, and the others."""
    dotted: list[str] = []
    others: list[str] = []
    queue = iter(words)
    for word in queue:
        ours = word.startswith(tuple(f"--{section}." for section in SECTIONS))
        (dotted if ours else others).append(word)
        if ours and "=" not in word:
            dotted += islice(queue, 1)
    return dotted, others
