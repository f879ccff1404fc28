"""The test files of docs/integrate/testing.md, with a mock generator's process in the place of its container."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from support.blocks import blocks
from support.chatml import make_chatml_model
from support.generators import running


@contextmanager
def _process(
    *,
    model: Path | str = "mock",
    faults: Mapping[str, Any] | None = None,
    script: Sequence[Mapping[str, Any]] = (),
    weights_dir: Path,
) -> Iterator[SimpleNamespace]:
    options = [f"--generator.mock.faults.{name}={value}" for name, value in (faults or {}).items()]
    if script:
        path = weights_dir.parent / "script.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in script))
        options.append(f"--generator.mock.script={path}")
    with running("mock", model, weights_dir, *options, log=weights_dir.parent / "generator.log") as generator:
        client = httpx.Client(base_url=generator.client.base_url, headers=generator.client.headers, timeout=120)
        yield SimpleNamespace(client=client)


def _names(test: str) -> dict[str, Any]:
    """Return the names of the page's file that defines `test`."""
    (block,) = [b for b in blocks("docs/integrate/testing.md", language="python") if f"def {test}(" in b.text]
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    return names


def test_the_pages_own_trainer_gets_all_groups_of_what_it_publishes(tmp_path: Path) -> None:
    test = "test_my_trainer_samples_from_what_it_publishes_although_requests_fail"
    names = _names(test)
    names["GeneratorContainer"] = _process
    names[test](tmp_path)


def test_the_pages_own_agent_gets_the_turns_of_its_script(tmp_path: Path) -> None:
    test = "test_my_agent_calls_the_tool_and_returns_the_answer"
    names = _names(test)
    names["MODEL"] = make_chatml_model(tmp_path / "model")
    names["GeneratorContainer"] = lambda **arguments: _process(**arguments, weights_dir=tmp_path / "weights")
    names[test]()
