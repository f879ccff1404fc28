"""What other code prints becomes log records with TANDEM_LOG=json, and stays as it is otherwise."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tandem_protocol import logs
from tandem_protocol.printed import PrintedLines, capture_output, show

JSON = {"TANDEM_LOG": "json"}


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    streams = sys.stdout, sys.stderr
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    sys.stdout, sys.stderr = streams
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logging.captureWarnings(False)


def records(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Return the logger and the message of each line of stdout."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["logger"].rpartition(".")[2], line["message"]) for line in lines]


def test_each_printed_line_is_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(JSON)
    capture_output(JSON)
    print("one", "two\nthree", end="")
    print(" four")
    print("\n \n", file=sys.stderr)
    sys.stderr.write("0%\r50%\r100%\r\n")
    print("no end", end="", file=sys.stderr)
    assert isinstance(sys.stderr, PrintedLines)
    sys.stderr.end()
    assert records(capsys) == [
        ("stdout", "one two"),
        ("stdout", "three four"),
        ("stderr", "100%"),
        ("stderr", "no end"),
    ]


def test_lines_of_threads_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(JSON)
    capture_output(JSON)
    print("first ", end="")
    thread = threading.Thread(target=print, args=("other",))
    thread.start()
    thread.join()
    print("last")
    assert records(capsys) == [("stdout", "other"), ("stdout", "first last")]


def test_a_project_that_changes_logging_gets_no_endless_loop(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(JSON)
    capture_output(JSON)
    logging.basicConfig(stream=sys.stdout, format="its own %(message)s", force=True)
    print("printed")
    logging.getLogger("tandem_trainer").warning("logged")
    assert capsys.readouterr().out.splitlines()[0] == "its own printed"


def test_a_second_call_changes_nothing_and_text_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    for env in ({}, {"TANDEM_LOG": "text"}):
        capture_output(env)
        assert sys.stdout is before
    logs.configure(JSON)
    capture_output(JSON)
    once = sys.stdout
    capture_output(JSON)
    assert sys.stdout is once
    assert sys.stdout.encoding.lower() == "utf-8"


def test_secrets_in_printed_lines_are_masked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_TOKEN", "a-very-secret-token-1234")
    logs.configure(JSON)
    capture_output(JSON)
    print("a-very-secret-token-1234")
    assert "secret-token" not in capsys.readouterr().out


def test_lines_of_another_program_are_records_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(JSON)
    log = logging.getLogger("tandem_trainer.a_test")
    record = json.dumps({"time": "t", "level": "info", "logger": "x.y", "message": "its record"})
    for line in (f"{record}\n", "0%\r100% done\n", '{"loss": 1}\n', "\n"):
        show(log, line, JSON)
    assert records(capsys) == [("y", "its record"), ("a_test", "100% done"), ("a_test", '{"loss": 1}')]
    show(log, "as it is\n", {})
    assert capsys.readouterr().out == "as it is\n"
