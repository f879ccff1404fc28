"""A Policy over a scripted engine and a store that is watched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.engines import ScriptedEngine, Start, WatchedStore
from tandem_generator.config import GeneratorConfig
from tandem_generator.policy import Policy


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def store(tmp_path: Path, engine: ScriptedEngine) -> WatchedStore:
    return WatchedStore(tmp_path, engine.calls)


@pytest.fixture
async def start(engine: ScriptedEngine, store: WatchedStore) -> AsyncIterator[Start]:
    """Starts a policy with some settings; all are closed at the end."""
    policies: list[Policy] = []

    async def start(**settings: Any) -> Policy:
        config = GeneratorConfig(generator_id="g", **({"visible_timeout_s": 5.0, "switch_timeout_s": 5.0} | settings))
        policies.append(Policy(engine, store, config))
        await policies[-1].start()
        return policies[-1]

    yield start
    for policy in policies:
        await policy.close()
