"""A plain TRL script that writes the seconds of each step into a file: trl_timed.py MODEL URL OUT STEPS ROWS LENGTH."""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model, url, out = sys.argv[1:4]
steps, rows, length = map(int, sys.argv[4:])


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.ends = [time.monotonic()]

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.monotonic())


def reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


stopwatch = Stopwatch()
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=out,
        max_steps=steps,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        per_device_train_batch_size=rows,
        num_generations=8,
        max_completion_length=length,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(10, 99)]}),
    callbacks=[stopwatch],
)
trainer.train()
seconds = [after - before for before, after in zip(stopwatch.ends, stopwatch.ends[1:], strict=False)]
tokens = [line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line]
Path(out).mkdir(exist_ok=True)
Path(out, "steps.json").write_text(json.dumps({"seconds": seconds, "tokens": tokens}))
