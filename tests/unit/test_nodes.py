"""The launchers of several nodes meet, stop together, and end if one of them is gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from support.ports import free_port
from tandem_trainer import nodes
from tandem_trainer.nodes import GONE, Nodes

TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "FAREWELL_S", 0.0)
    monkeypatch.setattr(nodes, "RETRY_S", 0.01)


class Group:
    """Launchers in one event loop, and the statuses with which they gave up, by node."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.port = free_port()
        self.gave_up: dict[int, int] = {}
        self.nodes = [self.node(rank) for rank in range(count)]

    def node(self, rank: int, count: int | None = None) -> Nodes:
        def give_up(status: int) -> None:
            self.gave_up.setdefault(rank, status)

        return Nodes(rank, count or self.count, "127.0.0.1", self.port, give_up)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not is_so():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)


@asynccontextmanager
async def group(count: int) -> AsyncIterator[Group]:
    """A group that has met."""
    made = Group(count)
    async with asyncio.timeout(TIMEOUT_S):
        ports = await asyncio.gather(*(node.meet() for node in reversed(made.nodes)))
    assert len(set(ports)) == 1
    assert made.port not in ports
    yield made
    for node in made.nodes:
        await node.leave(0)


def break_off(node: Nodes) -> None:
    """End a launcher without a word, as SIGKILL does."""
    for writer in node._peers.values():
        writer.transport.abort()


def run(test: Callable[[Group], object], count: int) -> None:
    async def whole() -> None:
        async with group(count) as made:
            await test(made)  # type: ignore[misc]

    asyncio.run(whole())


@pytest.mark.parametrize("lost", [0, 2])
def test_all_others_end_if_one_is_gone(lost: int):
    async def test(made: Group) -> None:
        break_off(made.nodes[lost])
        others = {*range(3)} - {lost}
        await made.until(lambda: made.gave_up.keys() >= others)
        assert {made.gave_up[rank] for rank in others} == {GONE}

    run(test, 3)


@pytest.mark.parametrize("status", [1, 2, 143])
def test_all_others_end_with_the_status_of_the_one_that_ended(status: int):
    async def test(made: Group) -> None:
        await made.nodes[1].leave(status)
        await made.until(lambda: made.gave_up.keys() >= {0, 2})
        assert (made.gave_up[0], made.gave_up[2]) == (status, status)

    run(test, 3)


def test_a_node_that_has_finished_the_run_ends_no_other():
    async def test(made: Group) -> None:
        await made.nodes[1].leave(0)
        await asyncio.sleep(0.2)
        assert not made.gave_up

    run(test, 3)


def test_a_node_that_was_replaced_ends_the_others_and_is_not_let_in():
    async def test(made: Group) -> None:
        again = asyncio.create_task(made.node(1).meet())
        await made.until(lambda: made.gave_up.keys() >= {0, 1, 2})
        assert not again.done()
        again.cancel()

    run(test, 3)


def test_a_stop_reaches_every_node_once(monkeypatch: pytest.MonkeyPatch):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: killed.append(call))

    async def test(made: Group) -> None:
        for _ in range(2):
            await made.nodes[1]._tell("stop")
        await made.until(lambda: len(killed) >= 2)
        await asyncio.sleep(0.1)
        assert killed == [(os.getpid(), 15)] * 2, "nodes 0 and 2"

    run(test, 3)


def test_a_stranger_and_a_node_that_starts_twice_do_not_disturb_the_meeting():
    async def whole() -> None:
        made = Group(2)
        first = asyncio.create_task(made.nodes[0].meet())
        await asyncio.sleep(0.1)
        _, stranger = await asyncio.open_connection("127.0.0.1", made.port)
        stranger.write(b"GET / HTTP/1.1\r\n\r\n")
        _, earlier = await asyncio.open_connection("127.0.0.1", made.port)
        earlier.write(b"meet 7 2\n")  # no such node
        _, earlier = await asyncio.open_connection("127.0.0.1", made.port)
        earlier.close()
        async with asyncio.timeout(TIMEOUT_S):
            assert await made.nodes[1].meet() == await first
        stranger.close()

    asyncio.run(whole())


def test_nodes_that_disagree_on_their_number_are_refused():
    async def whole() -> None:
        made = Group(2)
        first = asyncio.create_task(made.nodes[0].meet())
        with pytest.raises(ValueError, match="got TANDEM_TRAINER_NODES=3 on node 1, expected 2 as on node 0"):
            await made.node(1, count=3).meet()
        first.cancel()

    asyncio.run(whole())


@pytest.mark.parametrize(("rank", "missing"), [(0, r"nodes \[1, 2\]"), (1, r"nodes \[0\]")])
def test_nodes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, rank: int, missing: str):
    monkeypatch.setattr(nodes, "MEET_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match=missing):
        asyncio.run(Group(3).nodes[rank].meet())
