"""Every block of code in the documentation works. A block in a language without a rule fails the test.

`text` is for drawings and for the output of programs.
"""

from __future__ import annotations

import ast
import asyncio
import configparser
import functools
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import helm, learning_code
from support.blocks import PAGES, ROOT, Block, Command, blocks, commands
from support.documented_programs import PROGRAMS
from support.episode_blocks import EPISODES
from support.models import make_tokenizer
from support.programs import TIMEOUT_S, check_options, need, run
from support.rollouts import completion, read
from tandem_cli.plan.costs import Costs
from tandem_protocol.config import SECTIONS, load
from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.config.rollout import RewardConfig
from tandem_protocol.config.trainer import TrainerSettings
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.judge import Judge
from tandem_rollout.rewards.scoring import Rewards

BLOCKS = blocks(*PAGES)
MODULE = "a_block"
"""Name under which a block of Python is imported."""
BASE: dict[str, Any] = {"shared": {"model": "m"}, "trainer": {"max_steps": 1, "rewards": [{"function": "rewards:r"}]}}
"""Completes a block that shows only a part of a configuration."""
CHART = yaml.safe_load((ROOT / "helm/tandem/values.yaml").read_text())
OTHER_PROGRAMS = {"apiVersion", "groups", "scrape_configs"}
"""Keys by which YAML for Kubernetes or Prometheus is known. It must be YAML; its meaning is not checked."""
CHART_BASE = {"config": {"shared": {"model": "m"}, "trainer": {"max_steps": 1}}, "project": {"configMap": "mine"}}


def _is_of_the_chart(block: Block) -> bool:
    """True for values of the chart: YAML on a page about Kubernetes that has only the chart's keys."""
    if block.language != "yaml" or not block.page.startswith("docs/deploy/") or block.page.endswith("/containers.md"):
        return False
    values = yaml.safe_load(block.text)
    services = [name for name in ("generator", "trainer") if name in values]  # sections of config.yaml too
    return values.keys() <= CHART.keys() and all(values[name].keys() <= CHART[name].keys() for name in services)


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=str(b), marks=[pytest.mark.helm] * _is_of_the_chart(b)) for b in BLOCKS]
)
def test_every_block_of_code_works(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.language in RULES, f"{block}: no rule for {block.language!r}. Name a language, or `text` for a picture"
    monkeypatch.chdir(tmp_path)
    for name in (MODULE, learning_code.MODULE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    RULES[block.language](block)


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) >= 40
    assert {block.language for block in BLOCKS} == set(RULES)
    assert {"README.md", "docs/train/rewards.md", "examples/digits/README.md"} <= {block.page for block in BLOCKS}


# -- data ----------------------------------------------------------------------------------------------------------


def _yaml(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if _is_of_the_chart(block):
        helm.render(values if "config" in values else {**CHART_BASE, **values})
    elif "services" in values:
        _compose(block)
    elif values.keys() <= Costs.model_fields.keys():
        Costs.model_validate(values)
    elif values.keys() <= set(SECTIONS):
        above = [yaml.safe_load(b.text) for b in blocks(block.page, language="yaml") if b.line <= block.line]
        parts = [part for part in above if part.keys() <= set(SECTIONS)]
        _load(parts if "shared" in parts[0] else [BASE, *parts])
    else:
        assert values.keys() & OTHER_PROGRAMS, f"{block}: no rule for YAML with the keys {', '.join(values)}"


def _load(parts: list[dict[str, Any]]) -> None:
    """Load a configuration of which a page shows one part after another."""
    values: dict[str, Any] = {}
    for part in parts:
        for section, keys in part.items():
            values.setdefault(section, {}).update(keys)
    Path("config.yaml").write_text(yaml.safe_dump(values))
    for settings in (GeneratorSettings, TrainerSettings):
        load(settings, path=Path("config.yaml"), env={})


def _compose(block: Block) -> None:
    """Merge an override of compose.yaml. It may use networks that the reader declares."""
    need("docker", "compose")
    values = yaml.safe_load(block.text)
    networks = {name for service in values["services"].values() for name in service.get("networks", ())}
    values.setdefault("networks", {name: {} for name in networks - {"rl"}})
    Path("override.yaml").write_text(yaml.safe_dump(values))
    run("docker", "compose", "-f", str(ROOT / "compose.yaml"), "-f", "override.yaml", "config", "--quiet")


def _json(block: Block) -> None:
    """One object, or one per line."""
    assert all(isinstance(value, dict) for value in _objects(block))


def _unit(block: Block) -> None:
    """Check a systemd unit: its sections, and the script or compose command that it starts."""
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    unit.read_string(block.text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    for name in ("ExecStart", "ExecStop"):
        program, *words = unit["Service"][name].split()
        if program.startswith(checkout := "/opt/tandem/"):
            assert os.access(ROOT / program.removeprefix(checkout), os.X_OK)
            continue
        check_options(Command([Path(program).name, *words], {}))


def _objects(block: Block) -> list[Any]:
    try:
        return [json.loads(block.text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in block.text.splitlines()]


# -- Python --------------------------------------------------------------------------------------------------------

TEXTS = ["42", "no idea"]
REWARDS: dict[str, list[float]] = {
    "digits_in_place": [1.0, 0.0],
    "exact_match": [1.0, 0.0],
    "is_right": [1.0, 0.0],
    "is_short": [1.0, 1.0],
    "ends_with_a_number": [1.0, 0.0],
    "judge": [1.0, 0.0],
    "prefer": [1.0, 0.0],
}
"""Result of each reward function and judge on the pages for TEXTS, if the answer is 42."""
JUDGES = {"prefer"}


def _python(block: Block) -> None:
    """Run a block in an empty folder. Its functions are called as rewards or judges, or as `EPISODES` says."""
    if block.page == learning_code.PAGE:
        learning_code.check(block, BASE["trainer"])
        return
    if "trl" in block.text and not importlib.util.find_spec("trl"):
        ast.parse(block.text)  # tests/integration/test_run_with_mock.py runs such a script
        return
    module = sys.modules[MODULE]
    if "tandem_rollout.adapters" in block.text:  # needs another library; tests/unit/test_adapters.py has a stand-in
        imports: list[ast.stmt] = [node for node in ast.parse(block.text).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(block), "exec"), module.__dict__)
        _check_calls(block, module.__dict__)
        return
    exec(compile(block.text, str(block), "exec"), module.__dict__)
    _check_calls(block, module.__dict__)
    functions = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == MODULE]
    is_file_of_tests = any(name.startswith("test_") for name in functions)
    for name in () if is_file_of_tests else functions:
        check = EPISODES.get(name)
        check(getattr(module, name)) if check else _score(block, name)


def _check_calls(block: Block, names: dict[str, Any]) -> None:
    """Check that calls of imported classes use arguments that exist, also in functions that are not run."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and inspect.isclass(names.get(node.func.id)):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(names[node.func.id]).bind(*node.args, **keywords)


def _score(block: Block, name: str) -> None:
    """Score completions as the trainer does. Prompts come from the page; if it has none, a text and a conversation."""
    tokenizer = make_tokenizer(80)
    tokenizer.batch_decode = lambda *_, **__: TEXTS  # its vocabulary lacks these characters
    function = f"{MODULE}:{name}"
    scorer: Rewards | Judge = (
        Judge(function, drop_errors=False, timeout_s=TIMEOUT_S)
        if name in JUDGES
        else Rewards([RewardConfig(function=function)], drop_errors=False, timeout_s=TIMEOUT_S)
    )
    data = [value for json_block in blocks(block.page, language="json") for value in _objects(json_block)]
    rows = [value | {"answer": "42"} for value in data if value.keys() == {"prompt", "answer"}]
    for row in rows or [
        {"prompt": prompt, "answer": "42"} for prompt in ("6*7=", [{"role": "user", "content": "6*7="}])
    ]:
        prompt = PromptRow(0, "row 0", row.pop("prompt"), "text", (4,), row)
        scorer.check_parameters([prompt])
        scored = asyncio.run(scorer.score(prompt, read(tokenizer, prompt, [completion([5]), completion([6, 7])])))
        assert [one.reward for one in scored] == REWARDS[name]


# -- shell ---------------------------------------------------------------------------------------------------------


def _sh(block: Block) -> None:
    run("bash", "-n", "-c", block.text)
    found = list(commands(block.text))
    assert found
    missing: list[str] = []
    for command in found:
        program = command.words[0].removeprefix(".venv/bin/")
        assert program in PROGRAMS, f"{block}: no rule for the command {program}"
        for name in command.variables:
            assert not name.startswith("TANDEM_") or name in _known_variables(), f"nothing reads the variable {name}"
        try:
            PROGRAMS[program](command)
        except pytest.skip.Exception as skipped:  # go on and check the other commands
            missing.append(str(skipped))
    if missing:
        pytest.skip(missing[0])


def _console(block: Block) -> None:
    """Commands after `$`, and their output."""
    typed = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    assert typed
    _sh(block._replace(text="\n".join(typed)))


@functools.cache
def _known_variables() -> frozenset[str]:
    files = [ROOT / name for name in ("Makefile", "compose.yaml", "compose.gpu.yaml")]
    files += [*(ROOT / "services").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    return frozenset(name for file in files for name in re.findall(r"\bTANDEM_\w+", file.read_text()))


RULES: dict[str, Callable[[Block], None]] = {
    "console": _console,
    "ini": _unit,
    "json": _json,
    "python": _python,
    "sh": _sh,
    "text": lambda block: None,
    "yaml": _yaml,
}
