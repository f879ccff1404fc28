"""A plain TRL script that writes seconds and reward of each step into a file: trl_timed.py SPECIFICATION.

SPECIFICATION is JSON: model, data (prompts.jsonl beside rewards.py), function, out, and the options of GRPOConfig.
"""

import importlib
import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

given = json.loads(sys.argv[1])
data, out = Path(given["data"]), Path(given["out"])
sys.path.insert(0, str(data.parent))
reward = getattr(importlib.import_module("rewards"), given["function"])


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.ends = [time.monotonic()]

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = [time.monotonic()]

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.monotonic())


stopwatch = Stopwatch()
trainer = GRPOTrainer(
    model=given["model"],
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=str(out),
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **given["options"],
    ),
    train_dataset=Dataset.from_list([json.loads(line) for line in data.read_text().splitlines()]),
    callbacks=[stopwatch],
)
trainer.train()
logs = [line for line in trainer.state.log_history if "completions/mean_length" in line]
steps = [
    {"seconds": after - before, "tokens": line["completions/mean_length"], "reward": line["reward"]}
    for before, after, line in zip(stopwatch.ends, stopwatch.ends[1:], logs, strict=False)
]
out.mkdir(exist_ok=True)
(out / "steps.json").write_text(json.dumps(steps))
