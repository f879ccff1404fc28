"""`tandem watch` as a real process, and its page in a real browser."""

from __future__ import annotations

import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.browser import Browser

DEADLINE_S = 120.0


@contextmanager
def watching(*folders: Path) -> Iterator[str]:
    """Start the command. Yields the address that it prints."""
    command = [sys.executable, "-m", "tandem_cli", "watch", "--port", "0", *map(str, folders)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout
            ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
            found = re.search(r"http://\S+", process.stdout.readline() if ready else "")
            errors.seek(0)
            assert found, f"`tandem watch` printed no address within {DEADLINE_S} s: {errors.read()}"
            yield found[0]
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)


class Page:
    """The page in a tab of the browser."""

    def __init__(self, tab: Browser, address: str) -> None:
        self.tab = tab
        tab.resize(1280)
        tab.open(address)

    def go(self, view: str, found: str) -> None:
        """Open a view, and wait until it has replaced the one before, and an element of it is there."""
        mark = f"location.hash !== {view!r} && document.querySelector('#main > *')?.setAttribute('data-before', '')"
        self.tab.evaluate(f"void ({mark}, location.hash = {view!r})")
        self.wait(f"!document.querySelector('[data-before]') && document.querySelector({found!r})")

    def wait(self, condition: str) -> Any:
        """Wait until a JavaScript expression is true."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not (value := self.tab.evaluate(f"Boolean({condition})")):
            assert time.monotonic() < deadline_s, f"{condition} is not true. The page: {self.text('body')}"
            time.sleep(0.1)
        return value

    def text(self, selector: str) -> str:
        """Return the text that is shown of an element."""
        return str(self.tab.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def count(self, selector: str) -> int:
        return int(self.tab.evaluate(f"document.querySelectorAll({selector!r}).length"))

    def click(self, selector: str) -> None:
        self.tab.evaluate(f"void document.querySelector({selector!r}).click()")

    def press(self, key: str) -> None:
        """Press a key on the element that has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def widths(self) -> list[int]:
        """Return the width of the page's content in a window of 1280 and of 390 pixels."""
        found = []
        for width in (390, 1280):
            self.tab.resize(width)
            found.append(self.tab.evaluate("document.scrollingElement.scrollWidth"))
        return found[::-1]

    def nameless(self) -> list[str]:
        """Return the roles of controls without a name for a screen reader."""
        roles = {"button", "link", "textbox", "searchbox", "combobox", "spinbutton", "checkbox"}
        nodes = self.tab.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        assert shown
        return [node["role"]["value"] for node in shown if not node.get("name", {}).get("value")]

    def problems(self) -> list[str]:
        """Return what the browser complained about: errors of scripts, and what the page's policy has blocked."""
        thrown = [str(event["exceptionDetails"]) for event in self.tab.reported("Runtime.exceptionThrown")]
        logged = [event["entry"] for event in self.tab.reported("Log.entryAdded")]
        return thrown + [entry["text"] for entry in logged if entry["level"] == "error"]
