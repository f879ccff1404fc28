"""Call synchronous functions of the project in threads of their own, with a deadline.

An environment's methods always run in the same thread, because some objects, such as SQLite connections, require it.
A function that hangs cannot be stopped. Its thread is left behind, and does not keep the process from exiting.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple


class Hung(TimeoutError):
    """A synchronous function missed its deadline. It may still be running."""


class _Job(NamedTuple):
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Any]


class Worker:
    """One thread, which starts with the first call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.is_usable = True
        """False if a call has hung, or was cancelled while it ran."""

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call `function` in the thread.

        Raises:
            RuntimeError: an earlier call has hung.
        """
        if not self.is_usable:
            raise RuntimeError("an earlier call has not returned")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._jobs.put(_Job(function, loop, answer))
        try:
            return await answer
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """End the thread as soon as its current call returns."""
        self.is_usable = False
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                result, error = job.function(), None
            except BaseException as raised:  # such as SystemExit, which must not end this thread
                result, error = None, raised
            try:
                job.loop.call_soon_threadsafe(_settle, job.answer, result, error)
            except RuntimeError:  # the event loop is closed: nobody waits for the answer
                return


def _settle(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if answer.done():  # cancelled
        return
    if error is None:
        answer.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        answer.set_exception(error)
    else:  # a future cannot carry it, or it would end the run
        wrapped = RuntimeError(f"{type(error).__name__}: {error}")
        wrapped.__cause__ = error
        answer.set_exception(wrapped)


class Workers:
    """Threads for functions that may run at the same time. A thread is used again when its call has returned."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._idle: list[Worker] = []

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call `function` in a thread."""
        worker = self._idle.pop() if self._idle else Worker(self._name)
        try:
            return await worker.run(function)
        finally:
            if worker.is_usable:
                self._idle.append(worker)

    def close(self) -> None:
        """End the idle threads."""
        for worker in self._idle:
            worker.close()
        self._idle.clear()


async def call(function: Callable[[], Any], worker: Worker | Workers, timeout_s: float) -> Any:
    """Call an asynchronous function in the event loop, or a synchronous one in a thread.

    If a synchronous function returns an awaitable, as a decorated coroutine function may, the awaitable is awaited.

    Raises:
        Hung: the synchronous function did not return within `timeout_s`.
        TimeoutError: the asynchronous function did not return within `timeout_s`. It is cancelled.
        Exception: whatever the function raised. `SystemExit` becomes a `RuntimeError`: it must not end the run.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    if inspect.iscoroutinefunction(function):
        answer = function()
    else:
        answer = await _until(deadline_s, worker.run(function), Hung(f"no answer within {timeout_s:g} s"))
    if inspect.isawaitable(answer):
        return await _until(deadline_s, answer, TimeoutError(f"no answer within {timeout_s:g} s"))
    return answer


async def _until(deadline_s: float, awaitable: Awaitable[Any], late: TimeoutError) -> Any:
    """Await with a deadline. A task that ignores its cancellation is left behind."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(_harmless(awaitable))
    try:
        done, _ = await asyncio.wait({task}, timeout=deadline_s - loop.time())
    finally:
        task.cancel()  # has no effect if it is done
    if not done:
        await asyncio.sleep(0)  # the cancellation reaches the worker, which is then not usable
        raise late
    if task.cancelled():  # by the function itself: nobody has cancelled this episode
        raise RuntimeError("the function cancelled itself")
    return task.result()


async def _harmless(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
