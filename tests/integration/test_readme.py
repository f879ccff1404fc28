"""The project in the README trains as it is printed there, with a small model and the mock engine."""

from __future__ import annotations

import json
from typing import Any

import yaml

from support.blocks import blocks


def _only(language: str) -> str:
    (block,) = blocks("README.md", language=language)
    return block.text


def test_the_readmes_project_trains_and_rewards_right_answers(make_project: Any):
    project = make_project()
    ours = yaml.safe_load((project.directory / "config.yaml").read_text())
    config = yaml.safe_load(_only("yaml"))
    config["shared"] = ours["shared"]
    config["trainer"].update(max_steps=2, checkpoint={"every_steps": 1})
    # The mock samples random characters. With many questions, one-character answers and completions of one token, some
    # of its answers are right.
    config["trainer"]["rollout"].update(num_prompts=8, max_completion_length=1)
    rows = [json.loads(_only("json").replace("25", str(i)).replace("42", "4")) for i in range(32)]
    (project.directory / "config.yaml").write_text(yaml.safe_dump(config))
    (project.directory / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (project.directory / "rewards.py").write_text(_only("python"))

    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    run_dir = project.directory / "runs" / config["trainer"]["run_name"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["rewards"]["rewards:exact_match"] < 1 for line in lines)
    assert (run_dir / "checkpoints" / "000002").is_dir()
