"""Log lines: readable text by default, one JSON object per line with TANDEM_LOG=json."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import logging.config
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from tandem_generator.vllm_logging import PROGRESS, logging_config
from tandem_protocol import logs
from tandem_protocol.config import ConfigError
from tandem_rollout.availability import REPEAT_S, Availability
from tandem_trainer.run.step_line import StepLine

URL = "http://generator:8000"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.formatwarning
    yield
    sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.formatwarning = hooks
    for name in ("vllm", *PROGRESS):
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).handlers.clear()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_text_line_has_time_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({})
    logging.getLogger("tandem_trainer.x").info("step %d", 42, extra=logs.fields(step=42))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     step 42\n", capsys.readouterr().out)


def test_a_json_line_is_one_object_with_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({"TANDEM_LOG": "json"})
    logging.getLogger("tandem_trainer.x").warning("two\nlines – ü", extra=logs.fields(step=42))
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert datetime.fromisoformat(record.pop("time")).utcoffset() is not None
    assert record == {"level": "warning", "logger": "tandem_trainer.x", "message": "two\nlines – ü", "step": 42}


def test_a_traceback_stays_within_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({"TANDEM_LOG": "json"})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("tandem_generator").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: why" in json.loads(line)["traceback"]


def test_libraries_are_logged_from_warning_on_and_python_warnings_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({})
    logging.getLogger("httpx").info("a request")
    logging.getLogger("httpx").warning("a problem")
    warnings.warn("old", stacklevel=1)
    written = capsys.readouterr().err
    assert "a request" not in written
    assert "a problem" in written
    assert "old" in written


def test_vllm_logs_its_warnings_and_its_progress_in_our_format(capsys: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(logging_config(None))
    logging.getLogger("vllm.config").info("chatter")
    logging.getLogger("vllm.config").warning("a problem")
    logging.getLogger("vllm.model_executor.model_loader.default_loader").info("Loading weights took 2 s")
    lines = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r"\d{4}-.{14} (\w+ +.*)", line)[1] for line in lines] == [  # type: ignore[index]
        "WARNING  a problem",
        "INFO     Loading weights took 2 s",
    ]


def test_meaningless_warnings_of_vllm_are_left_out_unless_a_level_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    for level in (None, "warning"):
        logging.config.dictConfig(logging_config(level))
        logging.getLogger("vllm.config").warning("%s set, disabling torch.compile", "Enforce eager")
        assert ("Enforce eager" in capsys.readouterr().out) == (level is not None)


@pytest.mark.parametrize("library", ["torch", "transformers", "huggingface_hub"])
def test_libraries_with_formats_of_their_own_use_ours(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(importlib.import_module(library).__name__)
    before = logger.handlers[:], logger.propagate
    logs.configure({"TANDEM_LOG": "json"})
    logs.adopt(library)
    try:
        logging.getLogger(f"{library}.x").warning("a problem")
    finally:
        logger.handlers[:], logger.propagate = before
    (line,) = _json_lines(capsys.readouterr().err)
    assert line["message"] == "a problem"


def test_a_level_for_vllm_applies_to_all_of_its_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(logging_config("error"))
    logging.getLogger("vllm.config").warning("a problem")
    logging.getLogger("vllm.v1.worker.cpu").info("progress")
    assert capsys.readouterr().out == ""


def test_another_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="got TANDEM_LOG=xml, expected text or json"):
        logs.make_formatter({"TANDEM_LOG": "xml"})


def test_a_step_line_says_where_the_run_stands() -> None:
    line = StepLine(200)
    record = {
        "step": 42, "reward_mean": 0.5123, "rollout_tokens": 6176, "lag_max": 1,
        "timings": {"update": 2.0, "other_s": 1.2},
    }  # fmt: skip
    assert line(record) == "step 42/200  reward 0.512  1,930 tokens/s  lag 1  3.2 s  8 min 26 s left"
    record |= {"step": 200, "reward_mean": None, "eval": {"reward_mean": 0.61}}
    assert line(record) == "step 200/200  reward –  eval 0.610  1,930 tokens/s  lag 1  3.2 s"


def test_an_outage_is_reported_at_once_every_30_seconds_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = 100.0
    availability = Availability(clock=lambda: now_s)
    for _ in range(3):
        availability.failed(URL, "connection refused")
    assert caplog.messages == [f"waiting for generator {URL}: connection refused"]
    now_s += REPEAT_S
    availability.failed(URL, "not ready")
    assert caplog.messages[1:] == [f"still waiting for generator {URL} after 30 s: not ready"]
    now_s += 5
    availability.answered(URL)
    availability.answered(URL)
    assert caplog.messages[2:] == [f"generator {URL} answers again after 35 s"]


def test_a_replica_that_left_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    availability = Availability()
    availability.failed(URL, "connection refused")
    availability.gone({"http://other:8000"})
    availability.gone({"http://other:8000"})
    assert caplog.messages[1:] == [f"generator {URL} has left"]


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _in_a_thread() -> None:
    thread = threading.Thread(target=_fail)
    thread.start()
    thread.join()


def _in_a_task() -> None:
    async def start() -> None:
        asyncio.get_running_loop().create_task(_fail_later())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(start())
    gc.collect()


async def _fail_later() -> None:
    _fail()


def _fail() -> None:
    raise KeyError("added\ntokens")


def _at_the_top() -> None:
    try:
        _fail()
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)


class _Bad:
    def __del__(self) -> None:
        _fail()


UNCAUGHT = [_at_the_top, _in_a_thread, _in_a_task, _Bad]


@pytest.mark.parametrize("happens", UNCAUGHT, ids=["main thread", "thread", "task", "destructor"])
def test_an_exception_that_nothing_catches_is_one_record_with_its_traceback(
    happens: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure({"TANDEM_LOG": "json"})
    happens()
    (record,) = _json_lines(capsys.readouterr().err)
    assert record["level"] in ("error", "critical")
    assert record["message"].startswith("unexpected error: KeyError: 'added\\ntokens'; this is a bug in Tandem or its")
    assert record["exception"] == "KeyError"
    assert 'raise KeyError("added\\ntokens")' in record["traceback"]

    logs.configure({})
    happens()
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert re.match(r"\d{4}-.{14} (CRITICAL|ERROR)\s+unexpected error: KeyError: .*; this is a bug in Tandem", first)
    assert second.startswith("Traceback")


def test_ctrl_c_is_not_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({})
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""


def test_a_python_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({})
    warnings.warn("two\n  lines", stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"WARNING  UserWarning: two lines \(.*test_logs.py:\d+\)$", line)


def test_a_mistake_is_a_line_with_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({})
    logs.report_error(ConfigError("got a, expected b"))
    assert re.fullmatch(r"\d{4}-.{14} ERROR    got a, expected b\n", capsys.readouterr().err)


def test_a_wrong_log_format_is_reported_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as wrong:
        logs.configure({"TANDEM_LOG": "xml"})
    logs.report_error(wrong.value)
    assert capsys.readouterr().err.endswith(" ERROR    got TANDEM_LOG=xml, expected text or json\n")


async def test_a_request_that_brings_nothing_is_reported_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("tandem_rollout.availability.REPEAT_S", 0.05)
    async with Availability().watched(URL) as heard:
        for _ in range(10):
            heard()
            await asyncio.sleep(0.01)
        assert caplog.messages == []
        await asyncio.sleep(0.3)
    count = len(caplog.messages)
    await asyncio.sleep(0.1)
    assert {*caplog.messages} == {f"generator {URL} has sent nothing new for 0 s"}
    assert len(caplog.messages) == count > 1
