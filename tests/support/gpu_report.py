"""Print and keep each result of a benchmark at once, so that a run that is cut off still gives figures."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


class Report:
    """Prints a row of a table and a line of JSON per case. Errors of a case are a result too."""

    def __init__(self, deadline: float) -> None:
        """
        Args:
            deadline: a time of `time.monotonic`, after which no case is started.
        """
        self._deadline = deadline
        folder = os.environ.get("OUT")
        self._folder = Path(folder) if folder else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
        self.failed = 0

    def case(self, title: str, measure: Callable[[], Mapping[str, object]]) -> None:
        """Measure one case."""
        if time.monotonic() > self._deadline:
            return self._say(title, {"skipped": "no time is left"})
        began = time.monotonic()
        try:
            figures = dict(measure())
        except Exception as error:
            self.failed += 1
            traceback.print_exc()
            text = str(error).splitlines() or [""]
            figures = {"failed": f"{type(error).__name__}: {text[0][:200]}"}
        return self._say(title, figures | {"case_s": time.monotonic() - began})

    def _say(self, title: str, figures: Mapping[str, object]) -> None:
        rounded = {name: _rounded(value) for name, value in figures.items()}
        row = f"| {title} | " + ", ".join(f"{name} {value}" for name, value in rounded.items()) + " |"
        line = json.dumps({"case": title, **rounded})
        print(row, line, sep="\n", flush=True)
        if self._folder:
            for file, text in (("bench-gpu.md", row), ("bench-gpu.jsonl", line)):
                with (self._folder / file).open("a") as opened:
                    opened.write(text + "\n")


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
