"""The trainer as a real process with the mock generator: complete runs, and every way in which a run ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.generators import running
from support.projects import Project, assert_same_course
from tandem_cli.__main__ import main as tandem
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

PARTS = ("gather", "copy", "write", "commit", "visible", "verify", "pause", "load", "total")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Project:
    """A finished, undisturbed run of 5 steps."""
    directory = tmp_path_factory.mktemp("undisturbed")
    weights_dir = directory / "weights"
    weights_dir.mkdir()
    with running("mock", model, weights_dir, log=directory / "generator.log") as generator:
        project = Project(directory / "project", model, generator, weights_dir)
        ended = project.train()
        assert ended.returncode == 0, ended.stderr
    return project


def _tracked(project: Project, name: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs that TensorBoard received."""
    events = EventAccumulator(str(project.run_dir / "tandem"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_writes_metrics_completions_evaluations_and_weight_versions(make_project: Any):
    held_out = {"prompts": {"limit": 3}, "every_steps": 2, "num_generations": 4, "temperature": 1.0, "pass_at": [1, 4]}
    project = make_project(max_steps=4, eval=held_out, trackers=["tensorboard"])
    ended = project.train()
    assert ended.returncode == 0, ended.stderr

    metrics, completions = project.lines("metrics.jsonl"), project.lines("rollouts.jsonl")
    assert [(m["step"], m["version"], m["lag_max"]) for m in metrics] == [(s, f"{s}.1", 0) for s in (1, 2, 3, 4)]
    for line in metrics:
        assert line["rollout_tokens"] == pytest.approx(8 * line["completion_tokens_mean"])
        assert 0 < line["reward_mean"] < 1
        assert line["kl_sampler"] > 0
        phases = ("wait_for_rollouts", "update", "publish", "evaluate", "checkpoint", "other")
        assert set(line["timings"]) == {f"{phase}_s" for phase in phases}
        learning_s = sum(line["timings"].values()) - line["timings"]["evaluate_s"] - line["timings"]["checkpoint_s"]
        assert line["tokens_per_s"] == pytest.approx(line["rollout_tokens"] / learning_s)
        parts = dict(line["publish_timings"])
        assert set(parts) == {f"{part}_s" for part in PARTS}
        assert 0 < sum(parts.values()) - parts["total_s"] < parts["total_s"] < line["timings"]["publish_s"]
        assert line["publish_bytes"] == sum(t.numel() * t.element_size() for t in project.parameters(4).values())
    for phase in ("checkpoint_s", "evaluate_s"):
        assert [line["timings"][phase] > 0 for line in metrics] == [False, True, False, True]
    assert len(completions) == 4 * 4
    assert all(line["versions"] == [f"{line['step'] - 1}.1"] for line in completions)
    evals = project.lines("eval.jsonl")
    assert [(e["step"], e["n"]) for e in evals] == [(0, 3), (2, 3), (4, 3)]
    for e in evals:
        rates = e["pass_at"]["odd_rewards:odd"]
        assert 0 <= rates["1"] <= rates["4"] <= 1
        assert e["rewards"] == {"odd_rewards:odd": e["reward_mean"]}
    assert [line.get("eval") for line in metrics] == [
        None if e is None else {k: v for k, v in e.items() if k not in ("step", "version")}
        for e in (None, evals[1], None, evals[2])
    ]
    expected: list[Any] = [(m["step"], pytest.approx(m["reward_mean"])) for m in metrics]
    assert _tracked(project, "reward_mean") == expected
    assert [step for step, _ in _tracked(project, "eval/pass_at/odd_rewards:odd/4")] == [2, 4]
    status = json.loads((project.run_dir / "status.json").read_text())
    assert (status["phase"], status["step"], status["version"]) == ("finished", 4, "4.1")
    assert "command line" not in (project.run_dir / "config.resolved").read_text()
    store = WeightStore(project.directory.parent / "weights")
    assert store.latest() == Version(4, 1)
    assert store.versions()[-2:] == [Version(3, 1), Version(4, 1)]


def test_the_checkpoint_with_the_best_evaluation_is_kept_and_can_be_exported(make_project: Any, tmp_path: Path):
    project = make_project(
        max_steps=4,
        eval={"prompts": {"limit": 3}, "every_steps": 1, "num_generations": 4, "temperature": 1.0},
        checkpoint={"keep_best": True, "keep": 1, "every_steps": 10},
    )
    ended = project.train(ranks=2)
    assert ended.returncode == 0, ended.stderr
    rewards = {line["step"]: line["eval"]["reward_mean"] for line in project.lines("metrics.jsonl")}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert {path.name for path in (project.run_dir / "checkpoints").iterdir()} == {f"{best:06d}", "000004"}
    assert tandem(["export", str(project.run_dir), "--checkpoint", "best", "--to", str(tmp_path / "exported")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    expected = project.parameters(best)
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("1+2").input_ids


def test_rollouts_are_at_most_max_lag_versions_old(make_project: Any):
    project = make_project(max_steps=6, max_lag=2)
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    lags = [line["lag_max"] for line in project.lines("metrics.jsonl")]
    assert len(lags) == 6
    assert max(lags) == 2


@pytest.mark.parametrize("call", [7, 8], ids=["before step 4", "within step 4"])
def test_a_killed_run_resumes_bit_for_bit(make_project: Any, undisturbed: Project, call: int):
    project = make_project()
    assert project.train(ACTION="SIGKILL", AT_CALL=str(call)).returncode == -9
    assert project.steps == [1, 2, 3]
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert_same_course(project, undisturbed)
    assert [line["version"] for line in project.lines("metrics.jsonl")] == ["1.1", "2.1", "3.2", "4.2", "5.2"]


def test_a_run_with_an_adapter_publishes_only_the_adapter_and_resumes_bit_for_bit(make_project: Any):
    undisturbed, stopped = (make_project(name, max_steps=3, lora={"r": 4}) for name in ("undisturbed", "stopped"))
    assert undisturbed.train().returncode == 0
    store = WeightStore(undisturbed.directory.parent / "weights")
    manifest, _ = store.read(Version(3, 1))
    assert (manifest.kind, manifest.lora_rank) == ("lora", 4)
    assert {file.name for file in manifest.files} == {"adapter_config.json", "adapter_model.safetensors"}

    assert stopped.train(ACTION="SIGTERM", AT_CALL="4").returncode == 143
    assert stopped.steps == [1, 2]
    assert stopped.train().returncode == 0
    ours, theirs = stopped.parameters(3), undisturbed.parameters(3)
    assert ours.keys() == theirs.keys() == {tensor.name for tensor in manifest.tensors}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sigterm_finishes_the_step_writes_a_checkpoint_and_says_how_to_resume(make_project: Any, undisturbed: Project):
    project = make_project()
    ended = project.train(ACTION="SIGTERM", AT_CALL="5")
    assert ended.returncode == 143, ended.stderr
    assert "stopped at step 3 with a checkpoint. The same command resumes the run." in ended.stdout
    assert project.steps == [1, 2, 3]
    assert project.parameters(3)
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert_same_course(project, undisturbed)


def test_dropped_connections_and_failing_engines_do_not_change_the_result(make_project: Any, undisturbed: Project):
    project = make_project(
        faults=("--generator.mock.faults.drop_rate", "0.3", "--generator.mock.faults.error_rate", "0.3")
    )
    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    assert_same_course(project, undisturbed)


def test_a_generator_that_stays_stale_ends_the_run_and_both_versions_are_named(make_project: Any):
    project = make_project(
        faults=("--generator.mock.faults.stale", "true"),
        rollout={
            "num_prompts": 2,
            "num_generations": 4,
            "temperature": 1.0,
            "max_completion_length": 12,
            "timeout_s": 2,
        },
    )
    ended = project.train()
    assert ended.returncode == 1
    assert "got tokens of version 0.1, expected 1.1 or newer" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert project.steps == [1]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("raise", "KeyError: 'answer'"),
        ("short", "got 1 rewards, expected 4, one per completion"),
        ("hang", "no answer within 2 s"),
    ],
)
def test_a_bad_reward_function_ends_the_run_and_function_and_row_are_named(make_project: Any, action: str, words: str):
    project = make_project(reward_timeout_s=2)
    ended = project.train(ACTION=action, AT_CALL="3")
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "reward function odd_rewards:odd on prompts.jsonl row" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert project.steps == [1]


def test_user_errors_at_the_start_exit_2_without_a_traceback(make_project: Any):
    project = make_project()
    for arguments, env, words in [
        # Without HF_HUB_OFFLINE, transformers tries for half a minute to reach the hub.
        (("--shared.model=no-such-model",), {"HF_HUB_OFFLINE": "1"}, "no-such-model"),
        (("--trainer.prompts.source=none.jsonl",), {}, "none.jsonl cannot be read"),
        (("--trainer.rollout.max_completion_length=126",), {}, "row 0: the prompt has 4 tokens"),
        (("--trainer.trackers=[trackio]",), {}, "pip install trackio"),
        ((), {"TANDEM_TOKEN": "wrong"}, "token"),
    ]:
        ended = project.train(*arguments, **env)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        assert words in ended.stderr
