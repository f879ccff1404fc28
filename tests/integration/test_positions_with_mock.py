"""A run checks before its first step up to which length trainer and generators encode positions equally."""

from __future__ import annotations

from pathlib import Path

from support.architectures import make_architecture
from support.projects import make_projects

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


def test_a_prompt_beyond_the_length_that_both_sides_agree_on_is_refused(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    rollout = {"num_prompts": 2, "num_generations": 4, "max_completion_length": 62}
    with make_projects(tmp_path, model) as make:
        ended = make(faults=("--max-model-len", "200"), rollout=rollout).train()
    assert ended.returncode == 2
    assert "expected at most 2 (the model's length 64" in ended.stderr
