"""A real generator that computes another model from the same weights is detected before the first update."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.generators import running
from support.models import make_tiny_model
from support.projects import Project

pytestmark = pytest.mark.vllm

PLUGIN = """
def register():
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    inv_freq = RotaryEmbeddingBase._compute_inv_freq
    RotaryEmbeddingBase._compute_inv_freq = lambda self, base: 3.0 * inv_freq(self, base)
"""
"""A plugin that simulates a version of vLLM with other position encodings than transformers."""


@pytest.fixture
def other_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every generator that is started from now on compute with other position encodings."""
    folder = tmp_path / "plugin"
    (folder / "other_positions-1.dist-info").mkdir(parents=True)
    (folder / "other_positions.py").write_text(PLUGIN)
    (folder / "other_positions-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other-positions\n")
    (folder / "other_positions-1.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nother_positions = other_positions:register\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("VLLM_PLUGINS", "other_positions")


def test_other_position_encodings_end_the_run_before_its_first_update(tmp_path: Path, other_positions: None):
    model = make_tiny_model(tmp_path / "model", initializer_range=0.3)
    with running("vllm", model, tmp_path / "weights", log=tmp_path / "generator.log", forks=False) as generator:
        project = Project(tmp_path / "project", model, generator, tmp_path / "weights", log_completions=8)
        ended = project.train()
        assert ended.returncode == 2, ended.stderr
        assert "nats per token in the logprobs of the same tokens under the same weights" in ended.stderr
        assert "float32 in the trainer and float32 in the generators" in ended.stderr
        assert "trainer.max_mismatch" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (project.run_dir / "metrics.jsonl").exists()

        ended = project.train("--trainer.max_mismatch=100", "--trainer.max_steps=1")
        assert ended.returncode == 0, ended.stderr
        (line,) = project.lines("metrics.jsonl")
        assert line["mismatch"] > 0.2
        events = [(event["kind"], event["step"]) for event in project.lines("events.jsonl")]
        assert events[-3:] == [("mismatch", 1), ("checkpoint", 1), ("finished", 1)]
