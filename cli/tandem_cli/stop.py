"""SIGINT and SIGTERM as a wish that the program grants when it can."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Counts the signals while it is entered: the first asks to finish, the second to kill."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """0 without a signal, else 128 and the first one's number."""
        return 128 + self._first if self.count else 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._first = self._first or number
