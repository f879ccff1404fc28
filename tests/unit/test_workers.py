"""Calls of the project's functions have deadlines, and what hangs holds nothing else up."""

from __future__ import annotations

import asyncio
import sqlite3
import threading

import pytest

from tandem_rollout.workers import Hung, Worker, Workers, call


async def test_a_hanging_tool_does_not_delay_others() -> None:
    released = threading.Event()
    workers = Workers("test")
    hung = [asyncio.create_task(call(lambda: released.wait(30), workers, 20)) for _ in range(40)]
    await asyncio.sleep(0)
    assert await call(lambda: 1, workers, 5) == 1
    released.set()
    assert all(await asyncio.gather(*hung))


async def test_a_thread_is_used_again_unless_its_call_hung() -> None:
    released = threading.Event()
    workers = Workers("test")
    first = await call(threading.get_ident, workers, 5)
    assert await call(threading.get_ident, workers, 5) == first
    with pytest.raises(Hung):
        await call(lambda: released.wait(30), workers, 0.01)
    assert await call(threading.get_ident, workers, 5) != first
    released.set()
    workers.close()


async def test_a_cancelled_call_is_cancelled_at_once_and_its_thread_left_behind() -> None:
    released = threading.Event()
    worker = Worker("test")
    task = asyncio.create_task(call(lambda: released.wait(30), worker, 20))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="an earlier call has not returned"):
        await call(lambda: 1, worker, 20)
    released.set()


async def test_a_worker_always_uses_the_same_thread() -> None:
    worker = Worker("test")
    database = await call(lambda: sqlite3.connect(":memory:"), worker, 5)  # checks the thread itself
    assert await call(lambda: database.execute("select 1").fetchone(), worker, 5) == (1,)
    with pytest.raises(sqlite3.ProgrammingError):
        database.execute("select 1")
    await call(database.close, worker, 5)
    worker.close()
