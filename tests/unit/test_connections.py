"""Connections are used again, there are as many as requests, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from support.fake_generators import until
from tandem_rollout.connections import Connections

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes"


class Server:
    """An HTTP server that counts its connections."""

    def __init__(self) -> None:
        self.url = ""
        self.accepted = 0
        self.open = 0
        self.most_open = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.closes_after_answer = False
        self.requests_to_drop = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if self.requests_to_drop:
                    self.requests_to_drop -= 1
                    break
                await self.may_answer.wait()
                writer.write(ANSWER)
                if self.closes_after_answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def wait_open(self, count: int) -> None:
        await until(lambda: self.open == count)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    served = Server()
    listener = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield served
    served.may_answer.set()
    listener.close()


async def get(client: httpx.AsyncClient, server: Server) -> str:
    return (await client.get(server.url, timeout=20)).text


async def test_requests_in_a_row_use_one_connection(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections()) as client:
        assert [await get(client, server) for _ in range(5)] == ["yes"] * 5
    assert server.accepted == 1


async def test_requests_at_the_same_time_have_a_connection_each_and_later_ones_use_them_again(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections()) as client:
        for _ in range(2):
            server.may_answer.clear()
            asked = [asyncio.create_task(get(client, server)) for _ in range(150)]
            await server.wait_open(150)
            server.may_answer.set()
            assert await asyncio.gather(*asked) == ["yes"] * 150
        assert server.accepted == 150
    await server.wait_open(0)


async def test_with_a_limit_the_other_requests_wait(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections(most=3)) as client:
        assert await asyncio.gather(*(get(client, server) for _ in range(30))) == ["yes"] * 30
    assert server.most_open == 3


async def test_a_connection_that_the_server_has_closed_is_not_used(server: Server) -> None:
    server.closes_after_answer = True
    async with httpx.AsyncClient(transport=Connections(most=1)) as client:
        for _ in range(3):
            assert await get(client, server) == "yes"
            await server.wait_open(0)
    assert server.accepted == 3


async def test_cancelled_and_failed_requests_leave_no_connection_and_no_place_taken(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections(most=1)) as client:
        for _ in range(3):
            server.may_answer.clear()
            asked = asyncio.create_task(get(client, server))
            await server.wait_open(1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            server.may_answer.set()
            await server.wait_open(0)
            with pytest.raises(httpx.ConnectError):
                await client.get("http://127.0.0.1:1", timeout=20)
        assert await get(client, server) == "yes"


async def test_a_body_that_is_not_read_to_its_end_leaves_no_place_taken(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections(most=1)) as client:
        for _ in range(3):
            async with client.stream("GET", server.url):
                pass
        assert await get(client, server) == "yes"


async def test_connections_that_were_not_used_for_long_are_closed(server: Server) -> None:
    async with httpx.AsyncClient(transport=Connections(keep_alive_s=0.0)) as client:
        await asyncio.gather(*(get(client, server) for _ in range(20)))
        await get(client, server)
        await until(lambda: server.open == 1)


async def test_a_request_on_a_connection_that_the_server_closes_meanwhile_is_sent_again(server: Server) -> None:
    """An overloaded server closes unused connections late: when the next request is on its way."""
    async with httpx.AsyncClient(transport=Connections()) as client:
        assert await get(client, server) == "yes"
        server.requests_to_drop = 1
        assert await get(client, server) == "yes"
        assert server.accepted == 2
        server.requests_to_drop = 2
        with pytest.raises(httpx.RemoteProtocolError):
            await get(client, server)
        assert server.accepted == 3, "a new connection that breaks is an error"


async def test_a_switch_does_not_wait_for_rollouts_that_have_taken_all_connections(server: Server) -> None:
    server.may_answer.clear()
    async with httpx.AsyncClient(transport=Connections(most=2), timeout=60) as client:
        rollouts = [asyncio.create_task(client.post(server.url)) for _ in range(5)]
        await server.wait_open(2)
        switch = asyncio.create_task(client.put(server.url))
        await server.wait_open(3)
        server.may_answer.set()
        assert [response.text for response in await asyncio.gather(switch, *rollouts)] == ["yes"] * 6
        assert server.most_open == 3
