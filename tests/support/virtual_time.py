"""An event loop whose clock jumps to the next timer, and a portal to it in the same thread."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: moves the clock forward instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("everything waits, and nothing is due")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def pass_time(self, seconds: float) -> None:
        """Run everything that is due in the next `seconds`."""
        self.run_until_complete(asyncio.sleep(seconds))

    def finish(self) -> None:
        """Wait for all tasks, and ignore how they end."""
        self.run_until_complete(self._finish())

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


class SameThreadPortal:
    """Stands in for anyio's portal. A task makes progress only while the loop runs."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def start_task_soon(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> asyncio.Task[Any]:
        return self._loop.create_task(function(*arguments))  # type: ignore[arg-type]  # a coroutine function
