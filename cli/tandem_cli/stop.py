"""Turns SIGINT and SIGTERM into a request to stop, which the program handles when it can."""

from __future__ import annotations

import signal
from types import FrameType


class SignalCounter:
    """Counts the signals inside a `with` block. The first requests to finish, the second to kill."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0

    def __enter__(self) -> SignalCounter:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """0 without a signal, else 128 + the number of the first signal."""
        return 128 + self._first if self.count else 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._first = self._first or number
