"""The bench suite: what `make bench` writes, without measuring anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.bench import Table, alternate, ratio
from support.stack import ROOT

SCRIPT = ROOT / "tests/bench/suite.py"
BENCH = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--result", type=pathlib.Path)
parser.add_argument("--quick", action="store_true")
args = parser.parse_args()
print("a line of an engine's log")
table = {"title": "Speed", "columns": ["side", "s"], "rows": [["ours", "1" if args.quick else "2"]]}
args.result.write_text(json.dumps([table]))
"""


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The suite, with two benches `one` and `two` that measure nothing."""
    specification = importlib.util.spec_from_file_location("suite", SCRIPT)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "suite", module)
    specification.loader.exec_module(module)
    (tmp_path / "bench.py").write_text(BENCH)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(
        module, "BENCHES", {name: module.Bench("bench.py", f"About {name}.") for name in ("one", "two")}
    )
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    return module


def run(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["suite.py", *words])
    suite.main()


def test_the_page_has_each_bench_with_date_and_machine(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(suite, monkeypatch)
    page = suite.PAGE.read_text()
    assert page.count("| ours | 2 |") == 2
    assert "engine's log" not in page
    assert suite.machine() in page
    (first, second) = json.loads(suite.PAGE.with_suffix(".json").read_text()).values()
    assert first["date"] in page
    assert f"{(first['seconds'] + second['seconds']) / 60:.0f} minutes" in page


def test_one_bench_leaves_the_others_as_they_are(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(suite, monkeypatch)
    (suite.HERE / "bench.py").write_text(BENCH.replace('"2"', '"3"'))
    run(suite, monkeypatch, "--only", "two")
    page = suite.PAGE.read_text()
    assert page.index("| ours | 2 |") < page.index("## Two") < page.index("| ours | 3 |")


def test_a_try_prints_and_leaves_the_page(
    suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(suite, monkeypatch, "--quick")
    assert "| ours | 1 |" in capsys.readouterr().out
    assert not suite.PAGE.exists()


def test_a_bench_that_fails_ends_the_suite_with_its_log(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite.HERE / "bench.py").write_text("raise ValueError('no vLLM')")
    with pytest.raises(SystemExit, match=r"one failed:\n[\s\S]*ValueError: no vLLM"):
        run(suite, monkeypatch)


def test_the_page_of_the_documentation_is_made_of_its_results() -> None:
    command = [
        sys.executable,
        "-c",
        "import suite; print(suite.page(suite.read(suite.PAGE.with_suffix('.json'))), end='')",
    ]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == (ROOT / "docs/benchmarks.md").read_text()


def test_sides_take_turns_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    assert alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == ["a", "b"] * 3
    assert ratio([1.0, 9.0, 2.0], [4.0, 3.0, 100.0]) == "0.50"


def test_a_table_is_markdown() -> None:
    table = Table(title="T", columns=["a", "b"], rows=[["x", "1"]], note="A note.")
    assert table.markdown() == "**T**\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\nA note.\n"
