"""What repeats is logged at once and then ever more rarely, so that the log of a long run stays readable."""

from __future__ import annotations

import logging

import pytest

from tandem_protocol.repeats import FIRST_PAUSE_S, LONGEST_PAUSE_S, Repeats
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


def test_an_alert_of_every_step_is_logged_now_and_then_and_each_is_an_event(
    tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, is_main=True)  # type: ignore[arg-type]
    for step in range(50):
        journal.alert("episodes_failed", step, f"{step + 1} of 64 episodes failed")
    assert caplog.messages == ["1 of 64 episodes failed"]
    assert len([*journal._events.read()]) == 50
