"""Alerts on the screen of a run, and those of a TRL script."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tandem_cli.progress import GeneratorState, Progress
from tandem_cli.screen import PlainScreen, RunHeader, render
from tandem_protocol.config.alerts import AlertsConfig
from tandem_protocol.config.trl import TrlTrainerConfig
from tandem_protocol.version import Version
from tandem_trainer.trl.recorder import Recorder, Tally

HEADER = RunHeader("digits", "model", "mock", "runs/digits", generator_cpus=(0,), trainer_cpus=(1, 2))


def append(file: Path, **record: Any) -> None:
    with file.open("a") as lines:
        lines.write(f"{json.dumps(record)}\n")


class World:
    """A run's folder, and its two screens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress = Progress(folder, max_steps=10, probe=lambda: GeneratorState(True, "serving"))
        self.console = Console(width=200, file=io.StringIO(), record=True)
        self.plain = PlainScreen(self.console, HEADER)

    def step(self, number: int, **alerts: int) -> None:
        record = {"step": number, "version": f"{number}.1", "reward_mean": 0.5, "completion_tokens_mean": 6.5}
        append(self.folder / "metrics.jsonl", **record, rollout_tokens=500, timings={"update_s": 1.0}, alerts=alerts)

    def event(self, number: int, kind: str, level: str, **more: Any) -> None:
        append(self.folder / "events.jsonl", step=number, time_unix_s=1.0, level=level, kind=kind, **more)

    def live(self) -> str:
        self.progress.poll()
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(render(self.progress, HEADER, "Ctrl-C ends", elapsed_s=5.0, width=96))
        return console.export_text()

    def printed(self) -> str:
        self.progress.poll()
        self.plain.update(self.progress, "")
        return self.console.export_text()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_live_screen_shows_an_alert_while_it_goes_on_and_a_fault_until_the_next_step(world: World) -> None:
    world.event(0, "generator_lost", "warning", message="waiting for generator X")
    assert "waiting for generator X" in world.live()
    world.event(1, "truncated", "warning", message="A share of 0.9 \x1b[2J is cut off", state="raised")
    world.event(1, "checkpoint", "info", message="a checkpoint was written")
    world.step(1, truncated=1)
    shown = world.live()
    assert "A share of 0.9 ·[2J is cut off" in shown
    assert "waiting for generator X" not in shown
    assert "checkpoint was written" not in shown
    world.step(2)
    assert "cut off" not in world.live()


def test_the_plain_output_has_one_line_for_each_alert_and_its_end(world: World) -> None:
    world.step(1)
    world.event(1, "truncated", "warning", message="it is cut off", state="raised")
    world.event(1, "evaluation", "info", message="Reward 1")
    assert world.printed().count("warning after step 1: it is cut off\n") == 1
    world.event(2, "truncated", "info", message="it has ended", state="ended")
    world.step(2)
    printed = world.printed()
    assert "info after step 2: it has ended\n" in printed
    assert "cut off" not in printed
    assert "Reward 1" not in printed


def state_of(step: int) -> Any:
    return SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=20)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained(folder: Path, first: int, last: int, tally: Tally) -> None:
    """What TRL calls in the steps behind `first`, with a loss that is NaN and completions that are cut off."""
    state = state_of(first)
    recorder = Recorder(SimpleNamespace(), tally, folder)
    recorder.on_train_begin(SimpleNamespace(max_grad_norm=1.0), state, None)
    for step in range(first + 1, last + 1):
        state.global_step, tally.version = step, Version(step, 1)
        logs = {"loss": math.nan, "grad_norm": 1.0, "completions/clipped_ratio": 0.9, "reward": 0.5}
        recorder.on_log(None, state, None, logs | {"sampling/sampling_logp_difference/mean": 3.0})
    recorder.on_save(None, state, None)
    recorder.on_train_end(None, state, None)


def test_a_trl_script_raises_alerts_once_also_if_it_is_resumed(tmp_path: Path) -> None:
    trained(tmp_path, 0, 6, Tally())
    trained(tmp_path, 6, 9, Tally())
    found = [(event["kind"], event["step"]) for event in lines(tmp_path / "events.jsonl")]
    assert found == [
        ("not_finite", 1), ("truncated", 5), ("checkpoint", 6), ("stopped", 6),
        ("resumed", 6), ("checkpoint", 9), ("stopped", 9),
    ]  # fmt: skip
    assert lines(tmp_path / "metrics.jsonl")[-1]["alerts"] == {"not_finite": 1, "truncated": 5}


@pytest.mark.parametrize("alerts", [None, AlertsConfig(not_finite=None, truncated=None)])
def test_the_limits_of_a_trl_script_are_those_of_its_configuration(tmp_path: Path, alerts: AlertsConfig | None) -> None:
    tally = Tally()
    tally.alerts = TrlTrainerConfig(alerts=alerts).alerts
    trained(tmp_path, 0, 6, tally)
    assert [event["kind"] for event in lines(tmp_path / "events.jsonl")] == ["checkpoint", "stopped"]
    assert ("alerts" in lines(tmp_path / "metrics.jsonl")[0]) == (alerts is not None)


def test_a_script_whose_generators_run_the_model_notices_a_mismatch(tmp_path: Path) -> None:
    tally = Tally()
    tally.compares = True
    trained(tmp_path, 0, 2, tally)
    assert ("mismatch", 1) in [(event["kind"], event["step"]) for event in lines(tmp_path / "events.jsonl")]
