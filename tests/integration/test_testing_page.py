"""The test file of docs/integrate/testing.md, with a mock generator's process in the place of its container."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from support.blocks import blocks
from support.generators import running


@contextmanager
def _process(*, faults: Mapping[str, Any], weights_dir: Path) -> Iterator[SimpleNamespace]:
    options = [f"--generator.mock.faults.{name}={value}" for name, value in faults.items()]
    with running("mock", "mock", weights_dir, *options, log=weights_dir.parent / "generator.log") as generator:
        client = httpx.Client(base_url=generator.client.base_url, headers=generator.client.headers, timeout=120)
        yield SimpleNamespace(client=client)


def test_the_pages_own_trainer_gets_all_groups_of_what_it_publishes(tmp_path: Path) -> None:
    (block,) = blocks("docs/integrate/testing.md", language="python")
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    names["GeneratorContainer"] = _process
    names["test_my_trainer_samples_from_what_it_publishes_although_requests_fail"](tmp_path)
