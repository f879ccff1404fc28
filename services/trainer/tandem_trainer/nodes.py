"""The launchers of several nodes: they meet before the run, stop together, and end if one of them is gone.

torch's rendezvous does none of this. It waits 15 minutes for a node that does not come. A node that was replaced may
join a run that is about to end. And if a host loses its power, the others wait for it in a collective operation.

So each launcher holds a connection to that of node 0, at the rendezvous. A message is one line:

- `meet RANK NODES` from a node, when it has started. Node 0 answers `port PORT` to all when all have come.
- `stop`, when a launcher was asked to stop.
- `end STATUS`, when a launcher ends. A connection that breaks without it means that the node is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from anyio.from_thread import start_blocking_portal

from .rendezvous import own_address
from .run.stopping import STOPPED

log = logging.getLogger(__name__)

MEET_TIMEOUT_S = 900.0
"""How long a node waits for the others, whose pods may have to wait for devices and for their image."""
RETRY_S = 1.0
FAREWELL_S = 15.0
"""How long the trainer processes of this node may take to end by themselves after another node has ended."""
GONE = 1
"""The status of a node that ends because another one is gone."""
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""A host that vanishes is noticed after 30 s. Seconds, but milliseconds for the last one."""


@dataclass
class Nodes:
    """This launcher's connections to the others: node 0 has one to each, every other node has one to node 0."""

    rank: int
    count: int
    host: str
    port: int
    give_up: Callable[[int], object]
    """Called with an exit status if this node has to end because another one has."""
    _peers: dict[int, asyncio.StreamWriter] = field(default_factory=dict)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _is_stopping: bool = False
    _has_met: bool = False

    async def meet(self) -> int:
        """Wait until all nodes are there. Returns the port of node 0 for torch's rendezvous, which no earlier run used.

        Raises:
            ValueError: the nodes disagree on their number.
            TimeoutError: some did not come.
        """
        try:
            async with asyncio.timeout(MEET_TIMEOUT_S):
                port = await (self._receive() if self.rank == 0 else self._join())
        except TimeoutError as error:
            missing = sorted({*range(1, self.count)} - {*self._peers}) if self.rank == 0 else [0]
            raise TimeoutError(
                f"nodes {missing} did not come within {MEET_TIMEOUT_S:g} s. Fix: start them, and check that "
                f"{self.host}:{self.port} (TANDEM_TRAINER_RENDEZVOUS) leads to node 0."
            ) from error
        return port

    # -- node 0 --------------------------------------------------------------------------------------------------

    async def _receive(self) -> int:
        self._server = await asyncio.start_server(self._welcome, own_address(self.host), self.port)
        log.info("waiting for the other %d nodes on port %d", self.count - 1, self.port)
        while len(self._peers) < self.count - 1:
            self._arrival.clear()
            await self._arrival.wait()
        self._has_met = True
        with socket.create_server(("", 0)) as free:
            port = int(free.getsockname()[1])
        await self._tell(f"port {port}")
        return port

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to node 0."""
        word, *numbers = await _read(reader)
        rank, count = numbers if word == "meet" and len(numbers) == 2 else (0, 0)
        if count and count != self.count:
            await _write(writer, f"count {self.count}")
            writer.close()
        elif rank not in range(1, self.count):  # not a node
            writer.close()
        elif rank in self._peers and self._has_met:
            writer.close()  # it comes again, to the next node 0
            self._end(f"node {rank} has started again", GONE)
        else:
            _keep_alive(writer)
            if before := self._peers.get(rank):
                before.close()
            self._peers[rank] = writer
            self._arrival.set()
            await self._listen(rank, reader)
            if not self._has_met and self._peers.get(rank) is writer:
                del self._peers[rank]

    # -- every other node ----------------------------------------------------------------------------------------

    async def _join(self) -> int:
        log.info("waiting for node 0 at %s:%d", self.host, self.port)
        while True:
            with suppress(OSError):  # it has no address yet, or is not up
                reader, writer = await asyncio.open_connection(self.host, self.port)
                _keep_alive(writer)
                await _write(writer, f"meet {self.rank} {self.count}")
                word, *numbers = await _read(reader)
                if word == "count":
                    raise ValueError(
                        f"got TANDEM_TRAINER_NODES={self.count} on node {self.rank}, expected {numbers[0]} as on node 0"
                    )
                if word == "port":
                    self._peers[0] = writer
                    self._has_met = True
                    self._start(self._listen(0, reader))
                    return numbers[0]
                writer.close()
            await asyncio.sleep(RETRY_S)

    # -- during the run ------------------------------------------------------------------------------------------

    async def _listen(self, rank: int, reader: asyncio.StreamReader) -> None:
        """Follow what another launcher says until its connection ends."""
        while True:
            word, *numbers = await _read(reader)
            if word == "stop":
                await self._tell("stop", besides=rank)
                if not self._is_stopping:
                    self._is_stopping = True
                    os.kill(os.getpid(), signal.SIGTERM)
                continue
            if word == "end" and numbers:
                self._end(f"node {rank} has ended with status {numbers[0]}", numbers[0])
            elif self._has_met:
                self._end(f"node {rank} is gone", GONE)
            return

    def _end(self, reason: str, status: int) -> None:
        """End this node a little later, unless its processes end by themselves or the run is over."""
        if status != 0:
            self._start(self._end_later(reason, status))

    async def _end_later(self, reason: str, status: int) -> None:
        await self._tell(f"end {status}")
        await asyncio.sleep(FAREWELL_S)
        log.log(logging.INFO if status in STOPPED else logging.ERROR, "%s, so this node ends too", reason)
        self.give_up(status)

    async def follow_signals(self, signals: socket.socket) -> None:
        """Tell the other launchers when a signal asks this one to stop."""
        while number := await asyncio.get_running_loop().sock_recv(signals, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not self._is_stopping:
                self._is_stopping = True
                await self._tell("stop")

    async def leave(self, status: int) -> None:
        """Tell the other launchers how this one ends."""
        for task in self._tasks:
            task.cancel()
        await self._tell(f"end {status}")
        for writer in self._peers.values():
            writer.close()
        if self._server:
            self._server.close()

    async def _tell(self, message: str, besides: int | None = None) -> None:
        for rank, writer in list(self._peers.items()):
            if rank != besides:
                await _write(writer, message)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _read(reader: asyncio.StreamReader) -> tuple[str, *tuple[int, ...]]:
    """Return a message: its word and its numbers. The word is empty if the connection has ended."""
    try:
        word, *numbers = (await reader.readline()).decode().split()
        return word, *map(int, numbers)
    except (OSError, ValueError):
        return ("",)


async def _write(writer: asyncio.StreamWriter, message: str) -> None:
    with suppress(OSError):  # the reading side notices that the other one is gone
        writer.write(f"{message}\n".encode())
        await writer.drain()


@dataclass
class Meeting:
    """What the nodes agreed on, and how this one ends."""

    port: int
    """Port of node 0 for torch's rendezvous."""
    status: int = GONE
    """Exit status of this launcher. Set it before the `with` block ends."""


@contextmanager
def met(rank: int, count: int, host: str, port: int, give_up: Callable[[int], object]) -> Iterator[Meeting]:
    """Meet the launchers of the other nodes, and follow them in another thread until the `with` block ends.

    Args:
        give_up: called in that thread, with an exit status, if this node has to end because another one has.

    Raises:
        ValueError: the nodes disagree on their number.
        OSError: some did not come in time, or the port is in use.
    """
    nodes = Nodes(rank, count, host, port, give_up)
    signals, wakeup = socket.socketpair()
    with signals, wakeup, start_blocking_portal() as portal:
        meeting = Meeting(portal.call(nodes.meet))
        for end in (signals, wakeup):
            end.setblocking(False)
        before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        following = portal.start_task_soon(nodes.follow_signals, signals)
        try:
            yield meeting
        finally:
            signal.set_wakeup_fd(before)
            following.cancel()
            portal.call(nodes.leave, meeting.status)
