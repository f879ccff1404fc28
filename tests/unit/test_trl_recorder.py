"""What the run's files of a TRL script have from TRL's log, and when TRL is made to send its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_cli.run_folder import RunFolder
from tandem_trainer.trl.last_step import LastStep
from tandem_trainer.trl.recorder import Recorder, Tally, completion_rows, evaluation


def logged(name: str, reward: float) -> dict[str, Any]:
    """What TRL logs for the data set `name`, one of several."""
    return {f"eval_{name}_loss": 0.5, f"eval_{name}_runtime": 2.0, "eval_reward": reward, "eval_note": "text"}


def test_the_evaluations_of_several_data_sets_in_one_step_are_one_line() -> None:
    first = evaluation({"step": 1, "eval_a_reward": 9.0}, 2, logged("a", 0.25))
    both = evaluation(first, 2, logged("b", 0.75))
    rewards = {key: value for key, value in both.items() if key.endswith("_reward")}
    assert rewards == {"eval_reward": 0.75, "eval_a_reward": 0.25, "eval_b_reward": 0.75}
    assert (both["step"], both["reward_mean"], both["eval_a_loss"], both["eval_b_loss"]) == (2, 0.75, 0.5, 0.5)
    assert "eval_a_reward" not in evaluation(both, 4, {"eval_reward": 1.0, "eval_runtime": 2.0})


def last_loaded_at_the_start(release: str, last_loaded_step: int) -> int:
    trainer = SimpleNamespace(_last_loaded_step=last_loaded_step)
    LastStep(trainer, release).on_train_begin(None, None, None)
    return trainer._last_loaded_step


def test_weights_are_sent_before_the_first_step_although_trl_0_16_takes_them_as_sent() -> None:
    assert last_loaded_at_the_start("0.16.1", 0) == -1


@pytest.mark.parametrize("release", ["0.17.0", "1.10.0", "1.16.0"])
def test_weights_that_an_evaluation_has_sent_are_not_sent_again_before_the_first_step(release: str) -> None:
    assert last_loaded_at_the_start(release, 0) == 0


def test_a_script_that_begins_in_a_used_folder_sets_all_its_lines_aside(tmp_path: Path) -> None:
    names = ("metrics", "rollouts", "eval", "events")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text('{"step": 9}\n')
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    Recorder(SimpleNamespace(), Tally(), tmp_path).on_train_begin(None, state, None)
    for name in names:
        assert (tmp_path / f"{name}.1.jsonl").read_text() == '{"step": 9}\n'
        assert "9" not in "".join(file.read_text() for file in tmp_path.glob(f"{name}.jsonl"))


def test_logged_completions_have_the_advantages_that_trl_keeps() -> None:
    texts = [f"text {number}" for number in range(6)]
    logs = {"prompt": texts, "completion": texts, "rewards": {"r": [0.0] * 6}}
    with_them = completion_rows(SimpleNamespace(_logs=logs | {"advantages": [0, 1, 2, 3, 4, 5]}), 1)
    assert [(row["completion"], row["advantage"]) for row in with_them] == [(f"text {n}", n) for n in (2, 3, 4, 5)]
    assert not any("advantage" in row for row in completion_rows(SimpleNamespace(_logs=logs), 1))


def test_a_script_holds_the_lock_of_its_run_while_it_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1)
    first, second = (Recorder(SimpleNamespace(state=state), Tally(), tmp_path / "run") for _ in range(2))
    run = RunFolder(tmp_path / "run")
    first.on_train_begin(None, state, None)
    assert run.is_in_use
    second.on_train_begin(None, state, None)  # a second script in the same folder is warned, as its lines mix
    assert "is in use by a script, pid" in caplog.text
    second.end_with(KeyboardInterrupt())
    assert run.is_in_use
    first.on_train_end(None, state, None)
    assert not run.is_in_use
    first.on_train_begin(None, state, None)  # a script may train more than once
    assert run.is_in_use
    first.end_with(ValueError())
    assert not run.is_in_use
