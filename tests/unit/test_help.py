"""`--help` of the services and of `tandem`: complete, readable, quick, and with examples that work."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import tandem_generator.__main__
import tandem_generator.options
import tandem_trainer.__main__
from tandem_cli.__main__ import COMMANDS
from tandem_cli.__main__ import main as tandem
from tandem_cli.completion import SHELLS
from tandem_cli.parser import make_parser
from tandem_protocol.config import SharedConfig, parse_overrides
from tandem_protocol.config.generator import GeneratorConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.config.values import model_of
from tandem_trainer import launch

YAML = """
shared: {model: m}
trainer: {max_steps: 1, rewards: [{function: "rewards:exact_match"}]}
"""
MODULES = ("tandem_generator", "tandem_trainer", "tandem_trainer.launch", "tandem_cli")
MAINS = {"tandem_generator": tandem_generator.__main__.main, "tandem_trainer": tandem_trainer.__main__.main}
WITHOUT_DEFAULT = {"--check-project", "--help", "--check"}
"""Options that do something once, instead of setting something."""
Print = Callable[..., str]


@pytest.fixture
def print_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Print:
    """Returns what `--help` prints, on a terminal with `columns`."""

    def print_help(module: str, *words: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        if module == "tandem_trainer.launch":
            return launch.help_text()
        with pytest.raises(SystemExit) as exit_:
            MAINS.get(module, tandem)([*words, "--help"])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    return print_help


@pytest.fixture
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project of the examples, in the current folder."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for commands in found for name, command in commands.choices.items()}


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command with its parser, as its help shows it."""
    for service in (tandem_generator.options, tandem_trainer.__main__):
        parser = service._parser()
        service._list_keys(parser)
        yield parser.prog, parser
    yield from subcommands("tandem", make_parser())


def subcommands(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for word, command in commands_of(parser).items():
        yield f"{name} {word}", command
        yield from subcommands(f"{name} {word}", command)


OPTIONS = [
    pytest.param(action, id=f"{command} {max(action.option_strings or [action.dest], key=len)}")
    for command, parser in parsers()
    for action in parser._actions
    if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
]


@pytest.mark.parametrize("action", OPTIONS)
def test_every_option_has_a_description_and_its_default(action: argparse.Action) -> None:
    description, _, notes = (action.help or "").partition("(")
    assert len(description) > 5
    if not WITHOUT_DEFAULT & {*action.option_strings}:
        assert "default: " in notes or "required" in notes


def keys(key: str, model: type[BaseModel]) -> Iterator[str]:
    """Dotted keys of the values, without those of sections."""
    for name, field in model.model_fields.items():
        if inner := model_of(field.annotation):
            yield from keys(f"{key}.{name}", inner)
        else:
            yield f"{key}.{name}"


@pytest.mark.parametrize(
    ("module", "section", "model"),
    [("tandem_generator", "generator", GeneratorConfig), ("tandem_trainer", "trainer", TrainerConfig)],
)
def test_every_key_of_the_yaml_is_in_the_help(
    print_help: Print, module: str, section: str, model: type[BaseModel]
) -> None:
    shown = set(re.findall(r"^  (?:-\w+, )?--([\w.-]+)", print_help(module), re.MULTILINE))
    for key in (*keys("shared", SharedConfig), *keys(section, model)):
        option = key.partition(".")[2].replace("_", "-")
        # The keys of `trainer.eval.prompts` are described as those of `trainer.prompts`.
        assert shown & {key, option, key.replace(".eval.prompts.", ".prompts.")}, f"{key} is not in the help"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_tandem_names_every_command_and_each_has_examples_and_exit_codes(
    print_help: Print, command: str
) -> None:
    assert re.search(rf"^    {command} +\w", print_help("tandem"), re.MULTILINE)
    text = print_help("tandem", command)
    assert "\nexamples:\n" in text
    assert f"  tandem {command}" in text
    assert re.search(r"^exit codes:\n  0  ", text, re.MULTILINE)


def test_tandem_without_arguments_prints_its_help(print_help: Print, capsys: pytest.CaptureFixture[str]) -> None:
    text = print_help("tandem")
    assert tandem([]) == 0
    assert capsys.readouterr().out == text


def test_a_word_that_is_not_a_command_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem(["--demo"]) == 2
    assert "got --demo, which this command does not accept" in capsys.readouterr().err


def test_the_help_of_the_launcher_names_the_variables_that_it_reads(print_help: Print) -> None:
    source = Path(launch.__file__).read_text()
    read = {*re.findall(r'_number\(env, "(\w+)"', source), *re.findall(r"\{PREFIX\}([A-Z_]+)\"", source)}
    assert read == launch.VARIABLES.keys()
    assert all(f"  {launch.PREFIX}{name}" in print_help("tandem_trainer.launch") for name in read)


@pytest.mark.parametrize("words", [*MODULES, *(f"tandem {name}" for name in COMMANDS)])
def test_the_help_fits_80_columns_and_uses_wider_terminals(print_help: Print, words: str) -> None:
    assert max(map(len, print_help(*words.split()).splitlines())) <= 80
    assert max(map(len, print_help(*words.split(), columns=120).splitlines())) <= 120
    if words in MAINS:
        assert max(map(len, print_help(words, columns=120).splitlines())) > 100


@pytest.mark.parametrize("module", MODULES)
def test_help_is_printed_without_torch_and_vllm(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "tandem_protocol" in imported
    assert not imported & {"torch", "vllm", "transformers", "accelerate"}


def examples(text: str) -> list[list[str]]:
    """The commands among a help's examples, in words."""
    (block,) = re.findall(r"^examples:\n(.*?)^\S", f"{text}\n.", re.DOTALL | re.MULTILINE)
    lines = block.replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("module", MAINS)
@pytest.mark.usefixtures("_project")
def test_the_examples_of_a_service_are_accepted(
    print_help: Print, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    commands = examples(print_help(module))
    assert len(commands) >= 5
    for words in commands:
        if words[0] == "accelerate":
            launched = words.index("-m")
            assert words[:launched] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
            words = ["python", *words[launched:]]
        assert words[:3] == ["python", "-m", module]
        monkeypatch.chdir(here)  # the generator changes it
        assert MAINS[module]([*words[3:], "--check"]) == 0


@pytest.mark.usefixtures("_project")
def test_the_examples_of_the_launcher_become_the_trainer(print_help: Print) -> None:
    commands = examples(print_help("tandem_trainer.launch"))
    assert len(commands) == 3
    for words in commands:
        start = words.index("python")
        assert words[start : start + 3] == ["python", "-m", "tandem_trainer.launch"]
        env = dict(word.split("=", 1) for word in words[:start])
        assert env.keys() <= {f"{launch.PREFIX}{name}" for name in launch.VARIABLES}
        command = launch.trainer_command(env, words[start + 3 :])
        trainer = command[command.index("tandem_trainer") + 1 :]
        assert tandem_trainer.__main__.main([*trainer, "--check"]) == 0


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_the_examples_of_tandem_are_accepted(print_help: Print, command: str | None) -> None:
    text = print_help("tandem", *([command] if command else []))
    if command == "completion":
        assert all(f"tandem completion {shell}" in text for shell in SHELLS)
        return
    commands = examples(text)
    assert len(commands) >= 2
    for words in commands:
        assert words[0] == "tandem"
        arguments, rest = make_parser().parse_known_args(words[1:])
        parse_overrides(rest)
        assert command in (None, arguments.command)
