"""What goes wrong around a run is in its events.jsonl, in few lines."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from support.run_folders import GROUPS, Saved, all_events, make_run
from tandem_cli.watch.series import Series
from tandem_cli.watch.timeline import Timeline
from tandem_protocol.errors import EngineFailed, PolicyTorn, StalePolicy, SwitchFailed, TandemError
from tandem_protocol.logs import event
from tandem_protocol.version import Version
from tandem_rollout.answers import event_of
from tandem_rollout.availability import REPEAT_S, Availability
from tandem_rollout.calls import ProjectFunction
from tandem_rollout.replicas import Replicas
from tandem_trainer.run.events import BURST, FIRST_PAUSE_S, LONGEST_PAUSE_S, Events, make_event
from tandem_trainer.run.journal import Journal

URL = "http://generator:8000"
DAY_S = 86_400.0


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path, is_main=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def fault(kind: str = "generator_lost", **details: Any) -> dict[str, Any]:
    return make_event(kind, "warning", 1, "m", {"generator": URL} | details)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# -- few lines ---------------------------------------------------------------------------------------------------


def test_a_replica_that_comes_and_goes_for_ten_days_does_not_fill_the_disk(tmp_path: Path) -> None:
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock)
    count = 0
    lost, back = fault("generator_lost"), fault("generator_back")
    while clock.now_s < 10 * DAY_S:
        events.add((lost, back)[count % 2], may_repeat=True)
        events.flush()
        clock.now_s += 120.0
        count += 1
    events.flush(is_end=True)
    found = lines(tmp_path)
    assert len(found) < 10 * 24 + 20
    assert [one["kind"] for one in found[:BURST]] == ["generator_lost", "generator_back", "generator_lost"]
    assert BURST + sum(one.get("repeats", 0) for one in found) == count, "each event is in a line"
    assert found[-1]["kind"] == ("generator_lost", "generator_back")[(count - 1) % 2], "the last state is the true one"


def test_the_newest_of_merged_events_is_written_when_its_pause_is_over_or_the_run_ends(tmp_path: Path) -> None:
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock)
    for number in range(BURST + 2):
        events.add(fault(waited_s=number), may_repeat=True)
    events.flush()
    assert len(lines(tmp_path)) == BURST
    clock.now_s += FIRST_PAUSE_S
    events.flush()
    assert [(one["waited_s"], one.get("repeats")) for one in lines(tmp_path)[BURST:]] == [(BURST + 1, 2)]
    events.add(fault(waited_s=9), may_repeat=True)
    events.flush(is_end=True)
    assert (lines(tmp_path)[-1]["waited_s"], lines(tmp_path)[-1]["repeats"]) == (9, 1)


def test_events_about_other_things_are_not_merged_and_after_a_quiet_time_there_is_a_new_burst(tmp_path: Path) -> None:
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock)
    for number in range(10):
        events.add(fault(generator=f"http://g{number}"), may_repeat=True)
        events.add(fault("reward_failed", generator=None, function=f"rewards:r{number}"), may_repeat=True)
        events.add(fault("checkpoint"))
    assert len(lines(tmp_path)) == 30
    clock.now_s += 2 * LONGEST_PAUSE_S
    for _ in range(BURST + 1):
        events.add(fault(generator="http://g0"), may_repeat=True)
    assert len(lines(tmp_path)) == 30 + BURST


def test_a_full_disk_keeps_events_in_memory_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    events = Events(tmp_path / "events.jsonl", clock)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            events.add(fault(), may_repeat=True)
    events.flush()
    assert len(lines(tmp_path)) == 1


# -- from log records --------------------------------------------------------------------------------------------


def test_a_log_record_with_an_event_is_one_while_the_run_goes_on(journal: Journal, tmp_path: Path) -> None:
    log = logging.getLogger("tandem_rollout.anything")
    with journal.listening(lambda: 7):
        log.warning("generator %s is lost", URL, extra=event("generator_lost", generator=URL))
        log.warning("no event")
    log.warning("later", extra=event("generator_lost", generator=URL))
    (found,) = lines(tmp_path)
    assert {key: value for key, value in found.items() if key != "time_unix_s"} == {
        "step": 7, "level": "warning", "kind": "generator_lost", "message": f"generator {URL} is lost",
        "generator": URL,
    }  # fmt: skip


def test_only_the_main_process_writes_events(tmp_path: Path) -> None:
    journal = Journal(tmp_path, is_main=False)
    with journal.listening(lambda: 1):
        logging.getLogger("tandem_rollout.x").warning("m", extra=event("generator_lost"))
    journal.failed(1, ValueError("x"))
    journal.end(Version(1, 1), finished=True)
    assert lines(tmp_path) == []


def test_an_outage_is_an_event_when_it_begins_and_ends_but_a_generator_that_starts_is_none(
    journal: Journal, tmp_path: Path
) -> None:
    clock = Clock()
    availability = Availability(clock)
    with journal.listening(lambda: 1):
        availability.failed(URL, "refused")
        availability.answered(URL)
        assert lines(tmp_path) == [], "it was still starting"
        for _ in range(5):
            availability.failed(URL, "ConnectError: refused")
            clock.now_s += REPEAT_S
        availability.answered(URL)
        availability.failed("http://other:8000", "torn", "switch_failed")
        availability.answered(URL)
        availability.failed(URL, "refused")
        availability.gone(set())
    found = [(one["kind"], one["generator"]) for one in lines(tmp_path)]
    other = "http://other:8000"
    assert found[:3] == [("generator_lost", URL), ("generator_back", URL), ("switch_failed", other)]
    assert sorted(found[3:]) == [("generator_left", other), ("generator_lost", URL)], "more about URL are merged"
    assert lines(tmp_path)[1]["waited_s"] == 5 * REPEAT_S


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("refused"), "generator_lost"),
        (EngineFailed("x"), "generator_lost"),
        (StalePolicy("x"), "generator_stale"),
        (SwitchFailed("x"), "switch_failed"),
        (PolicyTorn("x"), "switch_failed"),
    ],
)
def test_the_kind_of_an_event_is_that_of_the_error(error: httpx.TransportError | TandemError, kind: str) -> None:
    assert event_of(error) == kind


async def test_a_change_of_the_number_of_replicas_is_an_event(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = iter([["10.0.0.1", "10.0.0.2"], ["10.0.0.3", "10.0.0.2"], ["10.0.0.2"], ["10.0.0.2", "10.0.0.4"]])

    async def resolved(_host: str, _port: int, family: socket.AddressFamily) -> list[str]:
        return next(looked_up) if family == socket.AF_INET else []

    monkeypatch.setattr("tandem_rollout.replicas._resolved", resolved)
    replicas = Replicas([URL])
    with journal.listening(lambda: 1):
        for _ in range(4):
            await replicas.now()
    found = [(one["kind"], one["level"], one["before"], one["now"]) for one in lines(tmp_path)]
    assert found == [("replicas_changed", "warning", 2, 1), ("replicas_changed", "info", 1, 2)]


async def test_a_reward_function_that_fails_is_an_event_if_the_run_goes_on(journal: Journal, tmp_path: Path) -> None:
    async def call(_: Mapping[str, Any]) -> Any:
        raise KeyError("answer")

    def check(answer: Any, size: int) -> Any:
        return answer

    function: Any = ProjectFunction("reward", "rewards:r", print, call, check, drop_errors=True)
    row: Any = SimpleNamespace(prompt="1+1", columns={}, where="prompts.jsonl, line 1")
    with journal.listening(lambda: 2):
        for _ in range(10):
            assert await function(row, 1) is None
    assert [one["kind"] for one in lines(tmp_path)] == ["reward_failed"] * BURST
    assert "KeyError: 'answer'" in lines(tmp_path)[0]["message"]


# -- the course of a run -----------------------------------------------------------------------------------------


def test_checkpoints_evaluations_resumes_and_the_end_are_events(tmp_path: Path) -> None:
    saved: Any = Saved()
    run = make_run(tmp_path)
    with run.record_outcome():
        run.journal.evaluation({"step": 0, "reward_mean": 0.25, "n": 8})
        run.make_record(9, GROUPS, {"loss": 0.25})
        run.checkpoint(9, saved, saved)
        run.log()
    again = make_run(tmp_path)
    again.resume(saved, saved)
    with pytest.raises(ValueError, match="broken"), again.record_outcome():
        raise ValueError("broken")
    found = [(one["kind"], one["step"], one["level"]) for one in all_events(tmp_path)]
    assert found == [
        ("evaluation", 0, "info"), ("checkpoint", 9, "info"), ("finished", 9, "info"),
        ("resumed", 9, "info"), ("failed", 9, "error"),
    ]  # fmt: skip
    assert all_events(tmp_path)[-1]["message"] == "broken"
    kinds = [one["kind"] for one in Timeline(again.dir, Series(again.dir / "metrics.jsonl")).read()["events"]]
    assert sorted(kinds) == sorted(kind for kind, *_ in found), "`tandem watch` shows none of them twice"


def test_a_run_that_is_asked_to_stop_and_one_that_ends_with_nan_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.record_outcome():
        run.make_record(1, GROUPS, {"loss": 0.25})
    with pytest.raises(FloatingPointError), run.record_outcome():
        raise FloatingPointError("the update has loss nan")
    assert [(one["kind"], one["level"]) for one in all_events(tmp_path)] == [
        ("stopped", "info"), ("not_finite", "error"),
    ]  # fmt: skip


def test_events_from_several_threads_are_whole_lines(journal: Journal, tmp_path: Path) -> None:
    async def write(number: int) -> None:
        for step in range(50):
            await asyncio.to_thread(journal.note, f"kind{number}", step, "m" * 1000)

    async def main() -> None:
        await asyncio.gather(*map(write, range(4)))

    asyncio.run(main())
    assert len(lines(tmp_path)) == 200
