"""Each alert is raised once by a run with its fault, ends with it, and is not raised by a healthy run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from support.rollouts import completion, scored
from support.run_folders import GROUPS, Saved, all_events, make_run
from tandem_protocol.config.alerts import AlertsConfig
from tandem_trainer.learner.mismatch import MismatchCheck
from tandem_trainer.run.alerts import Alerts, Change, page_of
from tandem_trainer.run.detectors import DETECTORS
from tandem_trainer.run.exporter import exposition
from tandem_trainer.run.measures import Facts
from tandem_trainer.run.repetition import is_repetitive

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/train/alerts.md").read_text()
BEGINS, ENDS, STEPS = 40, 80, 160
PAIR = [completion([5, 6]), completion([8])]
FACTS = Facts(num_prompts=16, compares=True, mismatch=0.2)

OF_UPDATES = {"loss", "grad_norm", "learning_rate", "entropy", "kl_sampler", "mismatch", "reasked", "eval"}
"""Figures that a skipped batch does not have."""
Plant = Callable[[int], Mapping[str, Any]]


def healthy(step: int) -> dict[str, Any]:
    """A step of a run that learns. Figures vary from step to step."""
    wave = math.sin(7.0 * step)
    progress = step / STEPS
    record = {
        "step": step,
        "reward_mean": 0.2 + 0.6 * progress + 0.05 * wave,
        "reward_std": 0.4,
        "mismatch": 1e-7,
        "kl_sampler": 0.005 + 0.004 * wave,
        "loss": 0.01 * wave,
        "grad_norm": 1.2 + wave,
        "learning_rate": 0.0 if step == 1 else 1e-5,
        "entropy": 0.8 - 0.6 * progress,
        "clip_ratio/region_mean": 0.1,
        "kl_reference": 0.3 * progress,
        "completion_tokens_mean": 100.0 * (1 + progress) + 20 * wave,
        "truncated_fraction": 0.1 + 0.1 * wave,
        "repetitive_fraction": 0.02,
        "reward_none_fraction": 0.05,
        "rewards_none_fraction": {"rewards:a": 0.05, "rewards:b": 0.6},
        "reasked": step % 5,
        "tool_calls": 20,
        "tool_errors": 6,
        "alerts": {},
    }
    if step % 10 == 0:
        record["eval"] = {"n": 256, "reward_mean": 0.2 + 0.5 * progress}
    return record


def evaluation_falls(step: int) -> dict[str, Any]:
    return {"eval": {"n": 256, "reward_mean": 0.1}} if step % 10 == 0 else {}


def skipped(_: int) -> dict[str, Any]:
    return {"skipped": True, "reward_std": 0.0}


PLANTS: dict[str, Plant] = {
    "kl_sampler": lambda _: {"kl_sampler": 0.2},
    "entropy_collapse": lambda _: {"entropy": 0.004},
    "rewards_equal": skipped,
    "reward_missing": lambda _: {"reward_none_fraction": 0.8},
    "reward_function_missing": lambda _: {"rewards_none_fraction": {"rewards:a": 0.05, "rewards:b": 1.0}},
    "truncated": lambda _: {"truncated_fraction": 0.9},
    "length_explosion": lambda _: {"completion_tokens_mean": 900.0},
    "repetition": lambda _: {"repetitive_fraction": 0.6},
    "grad_norm_spike": lambda step: {"grad_norm": 80.0} if step == BEGINS else {},
    "not_finite": lambda _: {"loss": math.nan},
    "learning_rate_zero": lambda _: {"learning_rate": 0.0},
    "clipped": lambda _: {"clip_ratio/region_mean": 0.7},
    "kl_reference": lambda _: {"kl_reference": 4.0},
    "reasked": lambda _: {"reasked": 20},
    "tool_errors": lambda _: {"tool_errors": 19},
    "evaluation_falls": evaluation_falls,
}
"""Name of the alert → what the figures are while the fault lasts. `mismatch` is not a figure of the record alone."""


def planted(plant: Plant, steps: Iterable[int] = range(1, STEPS + 1)) -> list[dict[str, Any]]:
    records = [healthy(step) | (dict(plant(step)) if BEGINS <= step < ENDS else {}) for step in steps]
    return [{k: v for k, v in one.items() if "skipped" not in one or k not in OF_UPDATES} for one in records]


def changes(alerts: Alerts, records: Iterable[Mapping[str, Any]]) -> list[tuple[int, Change]]:
    return [(record["step"], change) for record in records for change in alerts.check(record)]


def test_there_is_a_planted_fault_for_each_alert() -> None:
    assert {*PLANTS, "mismatch"} == DETECTORS.keys() == AlertsConfig.model_fields.keys()


def test_a_healthy_run_raises_no_alert() -> None:
    assert changes(Alerts(AlertsConfig(), FACTS), planted(lambda _: {})) == []


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_raises_its_alert_once_and_no_other(name: str) -> None:
    found = changes(Alerts(AlertsConfig(), FACTS), planted(PLANTS[name]))
    assert [(change.name, change.details["state"]) for _, change in found] == [(name, "raised"), (name, "ended")]
    (raised_at, raised), (ended_at, ended) = found
    assert BEGINS <= raised_at < ENDS
    assert ended_at > raised_at
    assert ended.details["since"] == raised_at
    detector = DETECTORS[name]
    assert detector.is_beyond(raised.details["value"], raised.details["limit"])
    assert raised.level == detector.level
    assert f"{raised.details['value']:.3g}" in raised.message
    assert "First: " in raised.message


@pytest.mark.parametrize("name", PLANTS)
def test_an_alert_that_is_switched_off_is_not_raised(name: str) -> None:
    config = AlertsConfig.model_validate({name: None})
    assert changes(Alerts(config, FACTS), planted(PLANTS[name])) == []
    assert changes(Alerts(None, FACTS), planted(PLANTS[name])) == []


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("resumed_at", [BEGINS - 1, BEGINS + 20, ENDS - 1])
def test_a_resumed_run_raises_and_ends_its_alerts_as_one_that_was_not_interrupted(name: str, resumed_at: int) -> None:
    records = planted(PLANTS[name])
    undisturbed = changes(Alerts(AlertsConfig(), FACTS), records)
    first, second = Alerts(AlertsConfig(), FACTS), Alerts(AlertsConfig(), FACTS)
    found, lines = [], []
    for record in records[:resumed_at]:
        found += changes(first, [record])
        lines.append(json.loads(json.dumps(record | {"alerts": first.active}).replace("NaN", "null")))
    second.resume(line for line in lines if not line.get("skipped"))
    if name == "rewards_equal" and resumed_at > BEGINS:  # skipped batches have no lines
        return
    assert found + changes(second, records[resumed_at:]) == undisturbed


def test_the_mock_raises_no_alert_about_probabilities() -> None:
    facts = Facts(compares=False, mismatch=30.0)
    records = [healthy(step) | {"mismatch": 3.0, "kl_sampler": 4.0} for step in range(1, 30)]
    assert changes(Alerts(AlertsConfig(), facts), records) == []


@pytest.mark.parametrize("excess", [0.9, 1.1])
def test_a_mismatch_is_an_alert_of_the_first_step(excess: float) -> None:
    alerts = Alerts(AlertsConfig(), Facts(compares=True, mismatch=excess, mismatch_text="Likely causes: x."))
    found = changes(alerts, [healthy(step) for step in range(1, 9)])
    assert [(step, change.name) for step, change in found] == ([(1, "mismatch")] if excess > 1 else [])
    assert all("Likely causes: x." in change.message for _, change in found)


@pytest.mark.parametrize("name", ["rewards_equal", "not_finite", "learning_rate_zero"])
def test_the_longest_row_that_a_limit_may_name_is_seen(name: str) -> None:
    record = {"frac_reward_zero_std": 1, "reward_mean": 0.5, "loss": None, "learning_rate": 0}
    config = AlertsConfig.model_validate({name: 64})
    found = changes(Alerts(config, Facts()), [record | {"step": step} for step in range(1, 70)])
    assert (64, name) in [(step, change.name) for step, change in found]
    with pytest.raises(ValidationError):
        AlertsConfig.model_validate({name: 65})


def test_batches_that_are_skipped_do_not_hide_an_entropy_collapse() -> None:
    steps = [healthy(step) | {"entropy": 0.004} for step in range(1, 20)]
    skipped = [{"step": step["step"], "skipped": True, "reward_mean": 0.5, "reward_std": 0.4} for step in steps]
    records = [record for both in zip(skipped, steps, strict=True) for record in both]
    assert "entropy_collapse" in {change.name for _, change in changes(Alerts(AlertsConfig(), Facts()), records)}


def test_a_solved_task_is_no_entropy_collapse() -> None:
    records = [healthy(step) | {"entropy": 0.001, "reward_mean": 0.99, "reward_std": 0.05} for step in range(1, 50)]
    assert changes(Alerts(AlertsConfig(), FACTS), records) == []


def test_short_completions_that_become_longer_do_not_explode() -> None:
    records = [healthy(step) | {"completion_tokens_mean": 2.0 if step < 30 else 20.0} for step in range(1, 60)]
    assert changes(Alerts(AlertsConfig(), FACTS), records) == []


def test_an_evaluation_that_falls_with_the_training_reward_is_not_exploited() -> None:
    falling = [healthy(s) | {"reward_mean": 0.3 - s / 400} | evaluation_falls(s) for s in range(BEGINS, ENDS)]
    records = [healthy(step) for step in range(1, BEGINS)] + falling
    assert changes(Alerts(AlertsConfig(), FACTS), records) == []


def test_the_limits_are_those_of_the_configuration() -> None:
    records = [healthy(step) | {"truncated_fraction": 0.3} for step in range(1, 20)]
    assert changes(Alerts(AlertsConfig(), FACTS), records) == []
    ((_, change),) = changes(Alerts(AlertsConfig(truncated=0.2), FACTS), records)
    assert (change.name, change.details["limit"]) == ("truncated", 0.2)


def test_figures_of_a_trl_script_raise_the_same_alerts() -> None:
    line = {"loss": math.nan, "completions/clipped_ratio": 0.9, "frac_reward_zero_std": 1.0, "kl": 9.0}
    records = [{"step": step, "reward_mean": 0.0, "mismatch": 0.1, **line} for step in range(1, 9)]
    alerts = Alerts(AlertsConfig(), Facts(compares=True, mismatch=2.0))
    assert {change.name for _, change in changes(alerts, records)} == {
        "mismatch", "not_finite", "truncated", "rewards_equal", "kl_reference",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 101. " * 30, True),
        ("42 " * 100, True),
        ("\ud83d" * 300, True),
        ("42 " * 20, False),
        ("x" * 100_000, True),
        (Path(__file__).read_text(), False),
        (PAGE, False),
        ("\n".join(f"| {row} | {row * row} | {row % 7} |" for row in range(200)), False),
    ],
)
def test_a_text_that_repeats_itself_is_noticed(text: str, expected: bool) -> None:
    assert is_repetitive(text) == expected


def test_each_alert_has_a_section_that_explains_it_and_a_row_of_its_fields() -> None:
    sections = re.findall(r"^## (.+)$", PAGE.partition("## Which fields")[2], re.MULTILINE)
    assert [section.lower().replace(" ", "_") for section in sections] == [*DETECTORS]
    rows = PAGE.partition("## Which fields")[2].partition("\n## ")[0]
    named = re.findall(r"^\| (`.*?`) \|", rows, re.MULTILINE)
    assert [name for cell in named for name in re.findall(r"`(\w+)`", cell)] == [*DETECTORS]
    assert page_of("grad_norm_spike") == "alerts.html#grad-norm-spike"


# -- in the folder of a run --------------------------------------------------------------------------------------


def steps(run: Any, last: int) -> None:
    """Make steps of which a quarter of the completions is cut off and has no reward."""
    for step in range(run.step + 1, last + 1):
        run.make_record(step, GROUPS, {"loss": 0.25})
        run.check_alerts()
        run.log()


def alerts_of(folder: Path) -> list[tuple[str, int, str]]:
    return [(event["kind"], event["step"], event["state"]) for event in all_events(folder) if "state" in event]


STRICT: dict[str, Any] = {"alerts": {"truncated": 0.25, "reward_missing": 0.25}}


def test_alerts_are_events_and_a_resumed_run_neither_doubles_nor_forgets_them(tmp_path: Path) -> None:
    saved: Any = Saved()
    run = make_run(tmp_path, **STRICT)
    steps(run, 3)
    run.checkpoint(3, saved, saved)
    steps(run, 6)
    raised = [("reward_missing", 5, "raised"), ("truncated", 5, "raised")]
    assert alerts_of(tmp_path) == raised

    again = make_run(tmp_path, **STRICT)
    again.resume(saved, saved)
    assert alerts_of(tmp_path) == [], "they are about steps that are computed again"
    steps(again, 6)
    again.checkpoint(6, saved, saved)
    assert alerts_of(tmp_path) == raised

    third = make_run(tmp_path, **STRICT)
    third.resume(saved, saved)
    steps(third, 9)
    assert alerts_of(tmp_path) == raised
    lines = [json.loads(line) for line in (third.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["alerts"] for line in lines] == [{}] * 4 + [{"reward_missing": 5, "truncated": 5}] * 5
    assert 'tandem_trainer_alerts{name="truncated"} 5\n' in exposition(lines[-1])


def test_skipped_batches_raise_alerts_before_the_first_step(tmp_path: Path) -> None:
    equal, silent = make_run(tmp_path / "equal"), make_run(tmp_path / "silent")
    for _ in range(5):
        equal.skip([scored([4], PAIR, [0.5, 0.5])])
        silent.skip([scored([4], PAIR, [None, None])])
    assert alerts_of(tmp_path / "equal") == [("rewards_equal", 1, "raised")]
    assert alerts_of(tmp_path / "silent") == [("reward_missing", 1, "raised")]


def test_a_run_without_alerts_has_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, alerts=None)
    steps(run, 6)
    assert run.record is not None
    assert "alerts" not in run.record
    assert not (run.dir / "events.jsonl").exists()


def test_a_mismatch_of_the_first_update_is_an_event_of_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.mismatch_check = MismatchCheck(run._config, ["float32"])
    run.mismatch_check.update(0.01, 100)
    run.make_record(1, GROUPS, {"mismatch": 0.01})
    run.check_alerts()
    (event,) = all_events(tmp_path)
    assert (event["kind"], event["step"], event["level"]) == ("mismatch", 1, "warning")
    assert event["value"] == pytest.approx(10)
    assert "expected at most 0.001 for float32 in the trainer" in event["message"]
