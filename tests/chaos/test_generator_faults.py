"""Random schedules of faulty generators: with the real client, nothing is lost or doubled, and no group is too old.

Each schedule has one to three replicas of the mock, which drop connections, fail in the middle of an answer, are slow,
cannot load a version, mislabel tokens, refuse requests and restart. A trainer takes batches, publishes versions, and is
stopped and killed. What happens is seeded, but the clock is real. So a schedule that fails may pass when repeated.

TANDEM_SCHEDULES=1000 makes more schedules than CI does.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from support.faulty_world import REPLICAS, Chances, World
from support.ports import free_port
from tandem_rollout import awaited_versions, client, dispatch

SCHEDULES = int(os.environ.get("TANDEM_SCHEDULES", "30"))
LAGS = (0, 1, 4)
AT_ONCE = 6
"""Schedules that are played at the same time, because each waits most of the time."""


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Let the client try again after milliseconds."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name, seconds in (
            (client, "FIRST_PAUSE_S", 0.005),
            (client, "LONGEST_PAUSE_S", 0.05),
            (client, "UNREACHABLE_PAUSE_S", 0.02),
            (dispatch, "FIRST_REST_S", 0.005),
            (dispatch, "LONGEST_REST_S", 0.05),
            (awaited_versions, "PAUSE_S", 0.02),
        ):
            patched.setattr(module, name, seconds)
        yield


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_lag", LAGS)
def test_nothing_is_lost_or_doubled_or_too_old_whatever_the_generators_do(
    portal: BlockingPortal, tmp_path: Path, max_lag: int
) -> None:
    free_ports: SimpleQueue[list[int]] = SimpleQueue()
    for _ in range(AT_ONCE):
        free_ports.put([free_port() for _ in range(REPLICAS)])

    def play(seed: int) -> Counter[str]:
        ports = free_ports.get()
        folder = tmp_path / str(seed)
        try:
            world = World(Chances(seed, max_lag), max_lag, portal, folder, ports)
            world.run()
        except BaseException as error:
            error.add_note(f"schedule {seed} at max_lag {max_lag}")
            raise
        finally:
            free_ports.put(ports)
        shutil.rmtree(folder)
        return Counter(
            attempts=world.attempt,
            restarts=world.restarted,
            reasked=sum(counts.reasked for counts in world.counts),
            refilled=sum(counts.refilled for counts in world.counts),
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        happened = sum(pool.map(play, range(SCHEDULES // len(LAGS))), Counter())
    print(happened)
    assert happened["attempts"] > SCHEDULES // len(LAGS), "trainers resumed"
    assert happened["restarts"] > 0
    assert happened["refilled"] > 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["publish", "stop"])
def test_a_schedule_that_fails_ends_its_generators(
    portal: BlockingPortal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    world = World(Chances(0, 0), 0, portal, tmp_path, [free_port() for _ in range(REPLICAS)])
    original = getattr(World, name)

    def failing(self: World) -> None:
        if name == "stop":
            original(self)
        raise OSError("the volume is gone")

    monkeypatch.setattr(World, name, failing)
    with pytest.raises(OSError, match="the volume is gone"):
        world.run()
    assert world.restarting.done(), "otherwise the portal would wait for ever"
