"""How the command lines of the documentation are checked: program → check of its arguments."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

import tandem_cli.parser
import tandem_generator.__main__
import tandem_rollout.adapters.verifiers
import tandem_rollout.server
import tandem_trainer.__main__
import tandem_trainer.merge
import tandem_trainer.trl.__main__
from tandem_protocol.config import parse_overrides

from .blocks import ROOT, Command, blocks
from .programs import check_options, run


def _make(command: Command) -> None:
    run("make", "--dry-run", *command.words[1:], cwd=ROOT)


def _tandem(command: Command) -> None:
    """Parse the command line. A project under examples/ must exist."""
    arguments, rest = tandem_cli.parser.make_parser().parse_known_args(command.words[1:])
    parse_overrides(rest)
    project = getattr(arguments, "project", None)
    if project and project.parts[0] == "examples":
        assert (ROOT / project / "config.yaml").exists()


def _services_check(words: list[str]) -> None:
    """Run a service with `--check`, on the README's project instead of the page's."""
    module = words[0]
    if module == "tandem_trainer.trl":
        assert tandem_trainer.trl.__main__.parse(words[1:]).script == Path("train.py")
        return
    (config,) = blocks("README.md", language="yaml")
    Path("config.yaml").write_text(config.text)
    arguments = ["config.yaml" if before == "--config" else word for before, word in pairwise(words)]
    mains = {"tandem_generator": tandem_generator.__main__.main, "tandem_rollout.server": tandem_rollout.server.main}
    main = mains.get(module, tandem_trainer.__main__.main)
    assert module in (*mains, "tandem_trainer", "tandem_trainer.launch")
    assert main([*arguments, "--check"]) == 0


def _python_m(command: Command) -> None:
    assert command.words[1] == "-m"
    module, *arguments = command.words[2:]
    if module == "tandem_trainer.merge":
        assert tandem_trainer.merge.main(arguments) == 2, "its arguments are read, and there is no adapter here"
    elif module == "tandem_rollout.adapters.verifiers":
        tandem_rollout.adapters.verifiers.parse(arguments)
    else:
        _services_check([module, *arguments])


def _accelerate(command: Command) -> None:
    assert command.words[1] == "launch"
    arguments = launch_command_parser().parse_args(command.words[2:])
    assert arguments.module
    _services_check([arguments.training_script, *arguments.training_script_args])


def _pip(command: Command) -> None:
    for before, word in pairwise(command.words):
        if before == "-r":
            assert (ROOT / word).exists()
        elif word.startswith("./"):
            assert (ROOT / word / "pyproject.toml").exists()
        elif extra := re.fullmatch(r"tandem-(\w+)\[(\w+)\]", word):
            folder = ROOT / ("cli" if extra[1] == "cli" else f"services/{extra[1]}")
            assert (
                extra[2] in tomllib.loads((folder / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            )
        else:
            assert word in ("install", "-r", "--no-deps", "--require-hashes"), word


def _docker(command: Command) -> None:
    """Check the options. Those after `docker compose run tandem` are options of `tandem`."""
    words = command.words
    at = words.index("tandem") if "run" in words and "tandem" in words else len(words)
    check_options(command._replace(words=words[:at]))
    if at < len(words):
        _tandem(command._replace(words=words[at:]))


def _no_options(command: Command) -> None:
    """A program that is not ours, without long options that could be wrong."""
    assert not [word for word in command.words if word.startswith("--")]


def _builtin(command: Command) -> None:
    """A command of the shell itself. `bash -n` has checked its syntax."""


def _systemctl(command: Command) -> None:
    assert command.words[1:3] == ["systemctl", "enable"]
    assert {word for word in command.words if word.startswith("-")} <= {"--now"}


PROGRAMS: dict[str, Callable[[Command], None]] = {
    "accelerate": _accelerate,
    "curl": _no_options,
    "docker": _docker,
    "echo": _builtin,
    "eval": _builtin,
    "export": _builtin,
    "git": _no_options,
    "grep": _no_options,
    "helm": check_options,
    "kubectl": check_options,
    "make": _make,
    "pip": _pip,
    "python": _python_m,
    "source": _builtin,
    "sudo": _systemctl,
    "tail": _no_options,
    "tandem": _tandem,
    "vllm": _no_options,
}
