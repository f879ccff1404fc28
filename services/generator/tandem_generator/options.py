"""Command line: the options of `trl vllm-serve`, the keys of the YAML, and any option of `vllm serve`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.config import SECTIONS, ConfigError, SharedConfig, load, parse_overrides
from tandem_protocol.config.generator import GeneratorConfig, GeneratorSettings
from tandem_protocol.config.help import ServiceParser, add_keys, described, metavar_of
from tandem_protocol.config.vllm_options import refuse_owned

from .engine_options import as_words, names_of

_SHARED = ("model", "revision", "trust_remote_code", "weights_dir")
_GROUPS = {
    "model": ("model", "revision", "trust_remote_code", "dtype", "max_model_len"),
    "engine": (
        "engine",
        "tensor_parallel_size",
        "data_parallel_size",
        "gpu_memory_utilization",
        "enable_prefix_caching",
        "enforce_eager",
    ),
    "server": ("host", "port", "generator_id", "shutdown_timeout_s"),
    "weights": ("weights_dir", "visible_timeout_s", "switch_timeout_s"),
    "health": ("canary_every_s", "canary_timeout_s"),
}
"""Group of the help → keys that have an option."""
_FLAGS = {"trust_remote_code", "enforce_eager", "enable_prefix_caching"}
_SHORT = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp"}
"""vLLM's own short forms."""
_NOT_KEYS = {"config", "check"}

_DESCRIPTION = """
Serve completions to a trainer, and switch to each weight version that it publishes. Most runs need --config only: the
options below override the file.

--max-model-len is the YAML key generator.max_model_len, and so on; --model, --revision, --trust-remote-code and
--weights-dir are keys of `shared`. --SECTION.KEY VALUE sets any key of the YAML. Every other option goes to
`vllm serve` (`vllm serve --help=all` lists them).
"""
_EPILOG = """
examples:
  # serve what the project's config.yaml says
  python -m tandem_generator --config project/config.yaml

  # without a file: a model of the hub, on two GPUs
  python -m tandem_generator --model HuggingFaceTB/SmolLM2-135M-Instruct -tp 2

  # without vLLM and a GPU, to test a trainer
  python -m tandem_generator --config project/config.yaml --engine mock

  # an option of `vllm serve`, and the same as a key of the YAML
  python -m tandem_generator --config project/config.yaml --max-num-seqs 64
  python -m tandem_generator --config project/config.yaml \\
      --generator.vllm.max_num_seqs 64

  # print every setting with its source, and start nothing
  python -m tandem_generator --config project/config.yaml --check

environment:
  TANDEM__SECTION__KEY   sets a YAML key: TANDEM__GENERATOR__PORT=8001
  TANDEM_TOKEN           bearer token, the same on both sides
  TANDEM_TOKEN_FILE      file with the token, instead of TANDEM_TOKEN

The command line wins over the environment, the environment over config.yaml, and config.yaml over the defaults.

exit codes:
  0  stopped by SIGTERM
  1  failed; starting again may help
  2  a setting is wrong; the message says which
"""


class Options(NamedTuple):
    """What the command line asks for."""

    settings: GeneratorSettings
    sources: dict[str, str]
    engine_args: list[str]
    """Words for vLLM's own parser, which checks them."""
    project: Path | None
    """Folder of the YAML file."""
    check: bool


def parse(argv: Sequence[str]) -> Options:
    """Read the command line, the YAML and the environment.

    Raises:
        ConfigError: a value does not fit the configuration's models.
    """
    args, rest = _parser().parse_known_args([_hyphens(word) for word in argv])
    overrides: dict[str, Any] = {
        f"{'shared' if name in _SHARED else 'generator'}.{name}": value
        for name, value in vars(args).items()
        if value is not None and name not in _NOT_KEYS
    }
    dotted, rest = _split_dotted(rest)
    by_key = parse_overrides(dotted)
    if duplicates := sorted(overrides.keys() & by_key.keys()):
        key = duplicates[0]
        option = f"--{key.partition('.')[2].replace('_', '-')}"
        raise ConfigError(f"got both {option} and --{key}, expected one of them. Fix: remove one.")
    settings, sources = load(GeneratorSettings, path=args.config, overrides=overrides | by_key)
    if rest and settings.generator.engine == "mock":
        raise ConfigError(f"got {' '.join(rest)}, expected no vLLM options with --engine mock. Fix: remove them.")
    refuse_owned(names_of(rest))
    engine_args = [*as_words(settings.generator.vllm), *rest]
    project = args.config.resolve().parent if args.config else None
    return Options(settings, sources, engine_args, project, args.check)


def _parser() -> argparse.ArgumentParser:
    usage = "[--config FILE] [OPTION ...]\n           [--SECTION.KEY VALUE ...] [OPTION OF `vllm serve` ...]"
    parser = ServiceParser("tandem_generator", usage, _DESCRIPTION, _EPILOG, _list_keys)
    parser.add_argument("--config", type=Path, metavar="FILE", help="The project's config.yaml. (default: no file)")
    parser.add_argument("--check", action="store_true", help="Print every setting with its source, and exit.")
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_option(group, name)
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str) -> None:
    field = (SharedConfig if name in _SHARED else GeneratorConfig).model_fields[name]
    option = f"--{name.replace('_', '-')}"
    text = described(field, field.description or "")
    if name in _FLAGS:
        # Bare or with --no- as in vLLM, or with a value as in TRL.
        off = f"--no-{option[2:]}"
        help_text = f"{text[:-1]}; off: {off})"
        group.add_argument(option, nargs="?", const="true", metavar="BOOL", help=help_text)
        group.add_argument(off, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    else:
        names = [option, _SHORT[name]] if name in _SHORT else [option]
        group.add_argument(*names, metavar=metavar_of(field.annotation), help=text)


def _list_keys(parser: argparse.ArgumentParser) -> None:
    """Add the keys without an option to the help."""
    with_option = {name for names in _GROUPS.values() for name in names}
    for section, model in (("shared", SharedConfig), ("generator", GeneratorConfig)):
        add_keys(parser, section, model, omit=lambda key: key.partition(".")[2] in with_option)


def _hyphens(word: str) -> str:
    """`--max_model_len=1` → `--max-model-len=1`; dotted keys and values do not change."""
    match = re.match(r"--[A-Za-z][\w-]*(?==|$)", word)
    return match[0].replace("_", "-") + word[match.end() :] if match else word


def _split_dotted(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate the words of `--generator.a.b VALUE` and `--shared.a=VALUE` from the others."""
    dotted: list[str] = []
    others: list[str] = []
    queue = iter(words)
    for word in queue:
        is_dotted = word.startswith(tuple(f"--{section}." for section in SECTIONS))
        (dotted if is_dotted else others).append(word)
        if is_dotted and "=" not in word:
            dotted += islice(queue, 1)
    return dotted, others
