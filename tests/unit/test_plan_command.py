"""`tandem plan`: reads the costs of runs and of files, recommends a split, and says what it does not know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.blocks import blocks
from tandem_cli.__main__ import main
from tandem_cli.plan.costs import Costs
from tandem_cli.plan.simulation import Split, simulate

PAGE = "docs/deploy/planning.md"
COSTS: dict[str, Any] = {
    "num_prompts": 8,
    "num_generations": 4,
    "lengths": [16, 24, 32, 200],
    "token_s": 0.02,
    "half_speed_at": 16.0,
    "update_s": 0.75,
    "other_s": 0.125,
    "publish_s": 0.25,
}
ONE_OF_EACH = Split(replicas=1, trainer_devices=1, max_lag=0)
Plan = Callable[..., Any]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs `tandem plan --json`, and returns what it prints."""

    def plan(*words: str | Path) -> Any:
        assert main(["plan", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return plan


def write_run(folder: Path, split: Split = ONE_OF_EACH, **changes: Any) -> Path:
    """Write the folder of a run that is as slow as the simulation says."""
    costs = Costs.model_validate(COSTS | changes)
    result = simulate(costs, split, steps=200)
    timings = {f"{name}_s": getattr(result, f"{name}_s") for name in ("update", "publish", "other")}
    timings |= {"wait_for_rollouts_s": result.wait_s, "evaluate_s": 0.0, "checkpoint_s": 0.0}
    rare = timings | {"update_s": 99.0, "checkpoint_s": 5.0}
    folder.mkdir(parents=True)
    lines = [{"step": 1, "timings": rare}, *({"step": step, "timings": timings} for step in range(2, 30))]
    lines[20] = {"step": 21, "timings": rare}
    mean = {"completion_tokens_mean": costs.mean_length}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | mean) + "\n" for line in lines) + '{"step": 3')
    lengths = [{"step": 1, "tokens": length, "status": "finished"} for length in costs.drawn]
    (folder / "rollouts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lengths))
    settings = {
        "shared.generators": [f"http://g{n}:8000" for n in range(split.replicas)],
        "trainer.max_lag": split.max_lag,
        "trainer.rollout.num_prompts": costs.num_prompts,
        "trainer.rollout.num_generations": costs.num_generations,
    }
    (folder / "config.resolved").write_text("".join(f"{key}  {value!r}  # file\n" for key, value in settings.items()))
    return folder


@pytest.mark.parametrize("split", [Split(1, 1, 0), Split(2, 1, 0), Split(1, 1, 1), Split(2, 1, 1)])
def test_the_costs_of_a_run_are_found(plan: Plan, tmp_path: Path, split: Split) -> None:
    run = write_run(tmp_path / "run", split)
    (tmp_path / "known.yaml").write_text("half_speed_at: 16")
    found = plan(run, "--costs", tmp_path / "known.yaml", "--devices", "2")
    # Lengths are drawn, and the run has another number of steps than the simulation that looks for the costs.
    assert found["costs"]["token_s"] == pytest.approx(COSTS["token_s"], rel=0.3)
    for name in ("update_s", "other_s", "num_prompts", "num_generations", "lengths"):
        assert found["costs"][name] == pytest.approx(COSTS[name]), name
    assert found["notes"] == []
    assert found["is_estimate"] is True


def test_two_runs_with_other_batches_show_how_generators_slow_down(plan: Plan, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{count}", num_prompts=count) for count in (2, 16)]
    assert plan(*runs, "--devices", "2")["costs"]["half_speed_at"] == COSTS["half_speed_at"]


def test_a_run_that_hardly_waited_is_said_to_show_little(plan: Plan, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Split(1, 1, 1), update_s=60.0)
    (note,) = [note for note in plan(run, "--devices", "2")["notes"] if "hardly waited" in note]
    assert "--trainer.max_lag 0" in note


def test_trainer_devices_divide_the_groups_and_generators_take_their_devices(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "costs.yaml").write_text(json.dumps(COSTS))
    words = ("--costs", tmp_path / "costs.yaml", "--devices", "9", "--devices-per-generator", "2", "--max-lag", "1")
    splits = [(row["replicas"], row["trainer_devices"]) for row in plan(*words)["rows"]]
    assert splits == [(4, 1), (3, 2), (2, 4)]


@pytest.mark.parametrize(("changes", "expected"), [({"update_s": 60.0}, 4), ({"update_s": 0.01}, 1)])
def test_the_slower_side_gets_the_devices(plan: Plan, tmp_path: Path, changes: dict[str, Any], expected: int) -> None:
    (tmp_path / "costs.yaml").write_text(json.dumps(COSTS | changes))
    found = plan("--costs", tmp_path / "costs.yaml", "--devices", "5", "--max-lag", "1")
    assert found["recommended"]["trainer_devices"] == expected
    assert found["recommended"]["step_s"] == min(row["step_s"] for row in found["rows"])


def test_of_rows_that_are_as_fast_the_one_with_the_smallest_lag_is_recommended(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "costs.yaml").write_text(json.dumps(COSTS | {"update_s": 60.0}))
    found = plan("--costs", tmp_path / "costs.yaml", "--devices", "2", "--max-lag", "1", "4", "8")
    assert found["recommended"]["max_lag"] == 1


def test_the_example_of_the_page_is_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (costs,) = blocks(PAGE, language="yaml")
    (shown,) = blocks(PAGE, language="text")
    (tmp_path / "costs.yaml").write_text(costs.text)
    assert main(["plan", "--costs", str(tmp_path / "costs.yaml"), "--devices", "8"]) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path / "costs.yaml"), "path/to/project/runs/short")
    assert shown.text.split() == printed.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "got neither a run nor --costs"),
        (("nothing",), "expected the folder of a run, PROJECT/runs/NAME"),
        (("trl",), "A TRL script does not measure its updates. Fix: write the costs into a file"),
        (("short",), "got short with 2 steps, expected 4 or more. Fix: train longer"),
        (("--costs", "nothing.yaml"), "nothing.yaml cannot be read"),
        (("--costs", "text.yaml"), "expected a mapping"),
        (("--costs", "broken.yaml"), "broken.yaml is not YAML"),
        (("--costs", "missing.yaml"), "num_generations is missing. Fix: add it, or name a run"),
        (("--costs", "wrong.yaml"), "got lengths: 0, expected another value"),
        (("--costs", "unknown.yaml"), "got the key speed, expected one of num_prompts"),
        (("run", "--max-lag", "-1"), "got --max-lag -1, expected 0 or more"),
        (("run", "--devices", "1"), "got --devices 1, expected 2 to 1024"),
        (("run", "--devices-per-generator", "0"), "got --devices-per-generator 0, expected 1 or more"),
    ],
)
def test_a_mistake_is_named_with_its_fix(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for name, timings in (("trl", {"publish_s": 1.0}), ("short", {"update_s": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(2 * f"{json.dumps({'step': 1, 'timings': timings})}\n")
    texts = {"text": "fast", "broken": "{", "missing": "num_prompts: 2", "unknown": "speed: 2"}
    texts["wrong"] = json.dumps(COSTS | {"lengths": [0]})
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert main(["plan", "--devices", "4", *words]) == 2
    assert message in capsys.readouterr().err
