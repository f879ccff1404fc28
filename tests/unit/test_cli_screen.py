"""The live screen and the summary, drawn from records without a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tandem_cli.progress import GeneratorState, Progress
from tandem_cli.screen import RunHeader, arrow, printable, render, sparkline
from tandem_cli.summary import facts, show_summary

HEADER = RunHeader("digits", "model", "mock", "runs/digits", generator_cpus=(0,), trainer_cpus=(1, 2))


def step(number: int, reward: float | None, **changes: object) -> dict[str, object]:
    timings = {"wait_for_rollouts_s": 1.0, "update_s": 3.0, "publish_s": 1.0, "checkpoint_s": 0.0}
    record = {"step": number, "version": f"{number}.1", "reward_mean": reward, "kl_sampler": 2e-4, "lag_max": 1}
    return record | {"completion_tokens_mean": 6.5, "rollout_tokens": 500, "timings": timings} | changes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(step(n + 1, reward)) + "\n" for n, reward in enumerate((0.25, None, 0.75)))
    )
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "reward_mean": 0.1}\n{"step": 3, "reward_mean": 0.9}\n')
    return tmp_path


def progress_of(run_dir: Path) -> Progress:
    progress = Progress(run_dir, max_steps=10, probe=lambda: GeneratorState(True, "serving", running=8, waiting=2))
    progress.poll()
    return progress


def drawn(progress: Progress, width: int = 96) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render(progress, HEADER, "Ctrl-C ends", elapsed_s=5.0, width=width))
    return console.export_text()


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([0.5, 0.5], 8, "▄▄"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([-1.0, 1.0], 8, "▁█"),
        ([0, 0, 1, 1], 2, "▁█"),
        (list(range(1000)), 4, "▁▃▆█"),
    ],
)
def test_a_sparkline_spans_the_range_and_averages_longer_series(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@pytest.mark.parametrize(("values", "text"), [([], "–"), ([0.5], "0.500"), ([0.5, 0.1, 0.75], "0.500 → 0.750")])
def test_an_arrow_shows_the_first_and_the_last_value(values: list[float], text: str) -> None:
    assert arrow(values).plain == text


def test_a_sampled_text_cannot_control_the_terminal(run_dir: Path) -> None:
    assert printable("a\nb\x1b[2J\x07") == "a⏎b·[2J·"
    sample = {"prompt": "\x1b]0;title\x07", "completion": "[bold]2[/bold]\x9b2J", "reward": 1.0}
    (run_dir / "rollouts.jsonl").write_text(json.dumps(sample) + "\n")
    text = drawn(progress_of(run_dir))
    assert "·]0;title· → [bold]2[/bold]·2J" in text
    assert not set("\x1b\x07\x9b") & set(text)


@pytest.mark.parametrize("width", [60, 76, 96])
def test_the_screen_shows_every_figure_at_any_width(run_dir: Path, width: int) -> None:
    lines = drawn(progress_of(run_dir), width).splitlines()
    assert max(map(len, lines)) == width
    words = " ".join(" ".join(lines).replace("│", "").split())
    for fact in ("3 of 10", "0.750 ▁█", "0.100 → 0.900", "100 tokens/s", "version 3.1 lag 1", "8 running, 2 waiting"):
        assert fact in words
    assert "CPU 0" in words
    assert "CPUs 1,2" in words


def test_a_run_without_a_step_can_be_drawn(tmp_path: Path) -> None:
    assert "0 of 10" in drawn(progress_of(tmp_path))


def test_the_remaining_time_is_estimated_from_past_steps(run_dir: Path) -> None:
    assert progress_of(run_dir).remaining_s == pytest.approx(7 * 5.0)


def test_the_summary_adds_up_the_records(run_dir: Path) -> None:
    assert facts(progress_of(run_dir)) == [
        ("steps", "3 of 10 in 15 s"),
        ("reward", "0.250 → 0.750"),
        ("evaluation", "0.100 → 0.900"),
        ("speed", "100 tokens/s"),
        ("time", "update 60%, wait for rollouts 20%, publish 20%, checkpoint 0%"),
        ("policy", "version 3.1"),
    ]


def test_the_summary_names_the_version_that_was_published_last(run_dir: Path) -> None:
    (run_dir / "status.json").write_text('{"phase": "finished", "version": "4.1", "since_unix_s": 0}')
    assert ("policy", "version 4.1") in facts(progress_of(run_dir)), "a TRL script logs a step before it publishes"


def test_the_summary_has_the_pass_rates_of_each_reward(run_dir: Path) -> None:
    evals = [(3, {}), (4, {"rewards:right": {"1": 0.25, "4": 0.5}}), (5, {"rewards:right": {"1": 0.75, "4": 1.0}})]
    lines = (json.dumps({"step": step, "reward_mean": None, "pass_at": rates}) for step, rates in evals)
    (run_dir / "eval.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rows = [(label, value) for label, value in facts(progress_of(run_dir)) if label.startswith("pass")]
    assert rows == [("pass@1", "0.250 → 0.750 (right)"), ("pass@4", "0.500 → 1.000 (right)")]


def test_the_summary_of_a_run_without_a_step_names_its_logs(tmp_path: Path) -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    show_summary(console, progress_of(tmp_path), tmp_path)
    assert "before its first step" in console.export_text()
    assert not (tmp_path / "reward.png").exists()
