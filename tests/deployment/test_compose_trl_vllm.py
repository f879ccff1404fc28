"""The TRL example learns under Compose with vLLM on the CPU, as examples/digits does with Tandem's own trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.stack import ROOT, stack

STEPS = 60
pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("cpu_images"),
]


def greedy_exact_match(model_dir: Path, rows: list[dict[str, str]]) -> float:
    """Return what examples/digits evaluates: the share of rows that the model answers right, without sampling."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**prompts, max_new_tokens=8, do_sample=False)[:, prompts.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def test_the_unmodified_script_learns_to_the_reward_of_digits(tmp_path: Path, digits_model: Path) -> None:
    folder = tmp_path / "trl"
    shutil.copytree(ROOT / "examples/trl", folder, ignore=shutil.ignore_patterns("model", "runs", "__pycache__"))
    shutil.copytree(digits_model, folder / "model")
    rows = [json.loads(line) for line in (digits_model.parent / "held_out.jsonl").read_text().splitlines()]
    with stack(folder, engine="vllm", variables={"TANDEM_SCRIPT": f"train.py --max_steps {STEPS}"}) as made:
        made.must("build", "trainer", timeout_s=600)
        made.must("up", "--no-build", "--exit-code-from", "trainer", timeout_s=900)
        records = made.metrics()
        learned = made.copy_runs(tmp_path / "runs") / "train/runs/digits-grpo"
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert greedy_exact_match(digits_model, rows) <= 0.4
    assert greedy_exact_match(learned, rows) >= 0.85
