"""A run's files: whole at any time, one line a step however often it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from support.rollouts import completion, scored
from tandem_protocol.version import Version
from tandem_trainer.checkpoint import Checkpoints
from tandem_trainer.metrics import JsonLines, completion_records, samples, step_record


def test_lines_of_steps_to_come_and_a_torn_line_are_forgotten(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = JsonLines(path)
    file.forget_after(2)
    assert file.last_step() == 2
    file.append([{"step": 3}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_checkpoint_appears_whole_and_old_ones_go(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.begin(step)
        (checkpoints.staging(step) / "state.json").write_text(str(step))
        before = checkpoints.latest()
        assert before is None or before.name != f"{step:06d}"
        checkpoints.commit(step)
        latest = checkpoints.latest()
        assert latest is not None
        assert (latest / "state.json").read_text() == str(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010", "000100"]


def test_what_a_killed_process_left_in_staging_is_no_checkpoint(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.begin(5)
    (checkpoints.staging(5) / "half").write_text("x")
    assert checkpoints.latest() is None
    checkpoints.begin(5)
    assert list(checkpoints.staging(5).iterdir()) == []


GROUPS = [
    scored([4], [completion([5, 6], version=Version(2, 1)), completion([7], finish="length")], [1.0, 0.5], row=3),
    scored([4], [completion([8], version=Version(2, 1)), completion([9], version=Version(1, 1))], [None, 0.0], row=4),
]


def test_a_step_record_holds_the_steps_values():
    record = step_record(
        Version(3, 1),
        samples(GROUPS, 2),
        {"loss": 0.25, "grad_norm": 2.0, "kl_sampler": 0.125},
        functions=["rewards:r"],
        groups_skipped=1,
        step_s=0.5,
    )
    assert record == {
        "step": 3,
        "version": "3.1",
        "reward_mean": 0.5,
        "reward_std": (1 / 6) ** 0.5,
        "rewards": {"rewards:r": 0.5},
        "loss": 0.25,
        "grad_norm": 2.0,
        "kl_sampler": 0.125,
        "lag_max": 2,
        "completion_tokens_mean": 1.25,
        "truncated_fraction": 0.25,
        "rollout_tokens": 5,
        "tokens_per_s": 10.0,
        "groups_skipped": 1,
    }


def test_the_sample_of_completions_takes_one_of_each_group_first():
    records = completion_records(Version(3, 1), GROUPS, 3)
    assert [(r["row"], r["completion"], r["reward"]) for r in records] == [
        (3, "text 0", 1.0),
        (4, "text 0", None),
        (3, "text 1", 0.5),
    ]
    assert records[2]["finish_reason"] == "length"
    assert records[0]["versions"] == ["2.1"]
