"""A TRL script that has the one line `trl.use()`, started without Tandem's program."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from support import trl
from support.generators import TOKEN, running
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version

SCRIPT = """
import sys

from tandem_trainer import trl

trl.use()

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model, port, out = sys.argv[1:]
prompts = Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(4)]})
args = GRPOConfig(
    output_dir=out, max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=4, num_generations=4,
    max_completion_length=12, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[],
    use_cpu=True, bf16=False, use_vllm=True, vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{port}",
)


def lengths(completions, **_):
    return [float(len(completion)) for completion in completions]


trainer = GRPOTrainer(model, lengths, args, train_dataset=prompts, eval_dataset=prompts)
trainer.evaluate()
trainer.train()
"""


@pytest.mark.trl
def test_a_script_with_the_one_line_trains_and_an_evaluation_before_it_takes_no_version_of_a_step(
    tmp_path: Path, model: Path
):
    (tmp_path / "train.py").write_text(SCRIPT)
    weights = tmp_path / "weights"
    variables = {
        "TANDEM_TOKEN": TOKEN, "TANDEM__SHARED__WEIGHTS_DIR": str(weights), "TANDEM__TRAINER__PUBLISH__KEEP": "99",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with running("mock", trl.make_readable(model), weights, log=tmp_path / "generator.log") as generator:
        words = [str(trl.NEWEST), "train.py", str(model), str(generator.port), "out"]
        process = subprocess.run(
            words, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=240, check=False
        )
        assert process.returncode == 0, process.stderr
        assert generator.served.version == Version(2, 1)
    assert WeightStore(weights).versions() == [Version(step, 1) for step in range(3)]
    lines = [json.loads(line) for line in (tmp_path / "runs/train/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["version"]) for line in lines] == [(1, "0.1"), (2, "1.1")]
    assert json.loads((tmp_path / "runs/train/status.json").read_text())["phase"] == "finished"
