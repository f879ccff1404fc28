"""Fixtures: a WeightSwitcher with a scripted engine, a fake name server, a fake nvidia-smi and a small volume."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.engines import ScriptedEngine, Start, WatchedStore
from support.gpus import NvidiaSmi
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config.generator import GeneratorConfig
from tandem_rollout import client as client_module

torch.set_num_threads(1)  # the models are tiny, so several threads would only slow the tests down

Names = dict[str, list[str]]
"""Host → addresses."""


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def store(tmp_path: Path, engine: ScriptedEngine) -> WatchedStore:
    return WatchedStore(tmp_path, engine.calls)


@pytest.fixture
async def start(engine: ScriptedEngine, store: WatchedStore) -> AsyncIterator[Start]:
    """Start switchers with given settings. All of them are closed at the end of the test."""
    switchers: list[WeightSwitcher] = []

    async def start(**settings: Any) -> WeightSwitcher:
        config = GeneratorConfig(generator_id="g", **({"visible_timeout_s": 5.0, "switch_timeout_s": 5.0} | settings))
        switchers.append(WeightSwitcher(engine, store, config))
        await switchers[-1].start()
        return switchers[-1]

    yield start
    for switcher in switchers:
        await switcher.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Fake name server: the test sets the addresses. The client retries without a pause."""
    known: Names = {}

    def getaddrinfo(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        if not known.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)
    return known


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvidiaSmi:
    """Fake nvidia-smi. It is the only one on PATH, and it is missing until the test sets its output."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return NvidiaSmi(folder)


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "volume"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tandem-test", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the permission to mount a small file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture
def signals() -> Iterator[None]:
    """Restore the signal handlers at the end of the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
