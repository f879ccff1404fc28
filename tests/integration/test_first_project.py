"""The project of docs/train/first-project.md is trained: with a small model in place of its own, on the mock."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import yaml

from support.blocks import blocks

PAGE = "docs/train/first-project.md"


def test_the_project_of_the_first_page_trains(make_project: Any):
    project = make_project()
    ours = yaml.safe_load((project.directory / "config.yaml").read_text())
    (block,) = blocks(PAGE, language="yaml")
    config = yaml.safe_load(block.text)
    config["shared"] = ours["shared"]
    config["trainer"].update(max_steps=2, checkpoint={"every_steps": 1})
    (project.directory / "config.yaml").write_text(yaml.safe_dump(config))
    prepare, rewards = (block.text for block in blocks(PAGE, language="python"))
    (project.directory / "prepare.py").write_text(prepare)
    (project.directory / "rewards.py").write_text(rewards)
    subprocess.run([sys.executable, "prepare.py"], cwd=project.directory, check=True, timeout=60)
    shown, _ = (block.text for block in blocks(PAGE, language="json"))
    assert (project.directory / "prompts.jsonl").read_text().splitlines()[0] == shown.strip()

    ended = project.train()
    assert ended.returncode == 0, ended.stderr
    run_dir = project.directory / "runs" / config["trainer"]["run_name"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["rewards"]["rewards:digits_in_place"] < 1 for line in lines)
    assert len((run_dir / "eval.jsonl").read_text().splitlines()) == 2
