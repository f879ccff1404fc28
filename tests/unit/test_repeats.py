"""What repeats is logged at once and then ever more rarely, so that the log of a long run stays readable."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tandem_protocol.logs import TextFormatter, handlers
from tandem_protocol.repeats import FIRST_PAUSE_S, LONGEST_PAUSE_S, Repeats
from tandem_protocol.version import Version
from tandem_rollout.availability import Availability
from tandem_trainer.run.journal import Journal

log = logging.getLogger("tandem_protocol.a_test")
HOUR_S = 3600


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_message_is_logged_at_once_and_its_repetitions_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    repeats = Repeats(log, clock)
    repeats.say(logging.WARNING, "a", "first")
    for _ in range(3):
        repeats.say(logging.WARNING, "a", "left out")
    repeats.say(logging.WARNING, "b", "another kind")
    clock.now_s += FIRST_PAUSE_S
    repeats.say(logging.WARNING, "a", "again")
    assert caplog.messages == ["first", "another kind", "again (3 more like this since the last such line)"]


def test_what_lasts_for_ten_hours_is_a_line_per_ten_minutes(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    repeats = Repeats(log, clock)
    for _ in range(10 * HOUR_S):
        repeats.say(logging.WARNING, "a", "again")
        clock.now_s += 1
    assert len(caplog.messages) == 64  # 10 hours of 6, and 4 while the pauses grow
    assert caplog.messages[-1] == "again (599 more like this since the last such line)"


def test_what_was_quiet_for_long_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    repeats = Repeats(log, clock)
    for _ in range(3):
        repeats.say(logging.WARNING, "a", "now and then")
        clock.now_s += LONGEST_PAUSE_S + 1
    assert caplog.messages == ["now and then"] * 3


def test_the_memory_for_kinds_is_bounded() -> None:
    repeats = Repeats(log)
    for number in range(5000):
        repeats.say(logging.DEBUG, f"{number}", "a kind")
    assert len(repeats._kinds) <= 1001


def test_a_night_without_a_generator_is_a_page_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    availability = Availability(clock)
    for _ in range(10 * HOUR_S):
        availability.failed("http://generator:8000", "refused")
        clock.now_s += 1
    availability.answered("http://generator:8000")
    assert caplog.messages[-1] == "generator http://generator:8000 answers again after 36000 s"
    assert len(caplog.messages) == 65
    clock.now_s += 1
    availability.failed("http://generator:8000", "refused")
    clock.now_s += FIRST_PAUSE_S
    availability.failed("http://generator:8000", "refused")
    assert caplog.messages[-1].startswith("still waiting for generator http://generator:8000 after 30 s")


def test_a_fault_of_every_step_is_logged_now_and_then_and_each_counts_as_an_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, is_main=True)
    for step in range(50):
        journal.alert("episodes_failed", step, f"{step + 1} of 64 episodes failed")
    journal.end(Version(50, 1), finished=True)
    assert caplog.messages == ["1 of 64 episodes failed"]
    assert count(tmp_path, "episodes_failed") == 50


def test_a_fault_that_the_rollouts_log_now_and_then_counts_as_an_event_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, repeats = Journal(tmp_path, is_main=True), Repeats(log)
    with journal.listening(lambda: 7):
        for _ in range(50):
            repeats.say(logging.WARNING, "a", "it failed", event="reward_failed", function="f")
    repeats.say(logging.WARNING, "a", "nobody listens", event="reward_failed", function="f")
    journal.end(Version(7, 1), finished=True)
    assert [record.getMessage() for record in caplog.records if record.name == log.name] == ["it failed"]
    assert count(tmp_path, "reward_failed") == 50


def test_events_that_the_log_leaves_out_reach_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:]
    logging.root.handlers[:] = handlers(TextFormatter())
    try:
        repeats = Repeats(logging.getLogger("tandem_protocol.another_test"))
        for _ in range(3):
            repeats.say(logging.WARNING, "a", "it failed", event="reward_failed")
    finally:
        logging.root.handlers[:] = before
    assert capfd.readouterr() == ("", "it failed\n")


def count(folder: Path, kind: str) -> int:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return sum(event.get("repeats", 1) for event in events if event["kind"] == kind)
