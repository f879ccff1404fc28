"""Read the log of a process with TANDEM_LOG=json."""

from __future__ import annotations

import json
from typing import Any

import pytest

LEVELS = {"debug", "info", "warning", "error", "critical"}


def records(*texts: str) -> list[dict[str, Any]]:
    """Return the records of a log. A line that is not one fails the test."""
    found = []
    for line in "".join(texts).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            pytest.fail(f"not JSON: {line!r}")
        assert {"time", "level", "logger", "message"} <= record.keys()
        assert record["level"] in LEVELS
        found.append(record)
    assert found
    return found


def messages(found: list[dict[str, Any]]) -> str:
    return "\n".join(record["message"] for record in found)
