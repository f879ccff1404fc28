"""A whole project for the real services, small enough for the mock engine and a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

from .models import make_tiny_model

_CONFIG = """\
shared: {model: model}
generator: {engine: mock, shutdown_timeout_s: 5}
trainer:
  max_steps: 3
  prompts: {source: prompts.jsonl}
  rewards: [{function: "rewards:even"}]
  rollout: {num_prompts: 4, num_generations: 4, max_completion_length: 8}
  optim: {learning_rate: 1.0e-3}
  eval: {prompts: {source: prompts.jsonl}}
"""
_REWARDS = '''\
def even(completion_ids, **columns):
    """Share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
'''


def make_tiny_project(folder: Path) -> Path:
    """A random model of some 20,000 parameters, twelve prompts and a reward that differs between completions."""
    make_tiny_model(folder / "model")
    (folder / "config.yaml").write_text(_CONFIG)
    (folder / "rewards.py").write_text(_REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(12)))
    return folder
