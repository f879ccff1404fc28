"""Measure or profile some updates of one side of the benchmark in trainer.py, which starts this script.

It runs in the environment of its side, so its top-level imports must exist in both environments.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LEARNING_RATE = 1e-5
WARM_UP, MEASURED = 1, 1


class Row(NamedTuple):
    prompt: list[int]
    completion: list[int]
    advantage: float


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Peak memory of the complete process."""
    added_mb: float
    """Part of `peak_mb` above the level after the model was loaded and the optimizer was created."""
    values: list[list[float]]
    """Loss, gradient norm and mean entropy of each update."""


def make_rows(rows: int, tokens: int, prompt: int, *, ragged: bool) -> list[Row]:
    """Return a group: the same prompt of `prompt` random tokens in each row, with `tokens` random completion tokens.

    If `ragged`, all completions but the first have tokens/8 to `tokens`.
    """
    rng = random.Random(0)
    vocabulary = range(3, 8192)
    prompt_ids = rng.choices(vocabulary, k=prompt)
    return [
        Row(
            prompt_ids,
            rng.choices(vocabulary, k=rng.randint(tokens // 8, tokens) if ragged and row else tokens),
            rng.gauss(0, 1),
        )
        for row in range(rows)
    ]


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


class Stopwatch:
    """Measures wall and CPU seconds of each update, and memory since the stopwatch was created."""

    def __init__(self) -> None:
        self._before_mb = status_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        self._laps: list[tuple[float, float]] = []
        self.begin()

    def begin(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._laps.append((time.perf_counter() - self._began[0], time.process_time() - self._began[1]))

    def measured(self, values: list[list[float]]) -> Measured:
        wall, cpu = zip(*self._laps[WARM_UP:], strict=True)
        peak_mb = status_mb("VmHWM")
        return Measured(statistics.median(wall), statistics.median(cpu), peak_mb, peak_mb - self._before_mb, values)


def make_update(model_dir: Path, rows: list[Row], learner: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """Return a function that makes one update of Tandem's learner, and returns its metrics."""
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from tandem_protocol.config import SharedConfig
    from tandem_protocol.config.trainer import TrainerConfig
    from tandem_protocol.messages import Completion, VersionSpan
    from tandem_protocol.version import Version
    from tandem_rollout.trajectory import Sequence
    from tandem_trainer import batch
    from tandem_trainer.algorithms.grpo import Grpo
    from tandem_trainer.learner.learner import Learner

    config = TrainerConfig.model_validate(
        {
            "max_steps": 1000,
            "rewards": [{"function": "rewards:r"}],
            "optim": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
            "grpo": {"importance_sampling": "none"},  # TRL's behaviour without vLLM
            "learner": learner,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    policy = Learner(
        SharedConfig(model=str(model_dir)), config, tokenizer, Accelerator(cpu=True), needs_reference=False
    )
    algorithm = Grpo(config)

    def update() -> dict[str, float]:
        trained = batch.pad(
            [
                batch.Row(
                    Sequence.of_completion(
                        prompt,
                        Completion(
                            token_ids=tuple(completion),
                            logprobs=(-1.0,) * len(completion),
                            finish_reason="stop",
                            versions=(VersionSpan(version=Version(0, 1), tokens=len(completion)),),
                        ),
                    ),
                    advantage,
                    in_loss=True,
                    trajectory_tokens=len(completion),
                )
                for prompt, completion, advantage in rows
            ],
            trajectory_total=len(rows),
            token_total=sum(len(row.completion) for row in rows),
        )
        return policy.update(trained, algorithm)

    return update


def run_tandem(model_dir: Path, rows: list[Row], updates: int, learner: dict[str, Any]) -> Measured:
    update = make_update(model_dir, rows, learner)
    watch = Stopwatch()
    values = []
    for _ in range(updates):
        watch.begin()
        stats = update()
        watch.end()
        values.append([stats["loss"], stats["grad_norm"], stats["entropy"]])
    return watch.measured(values)


def run_trl(model_dir: Path, rows: list[Row], updates: int, *, cut: bool) -> Measured:
    import torch
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(model_dir / "trl"),
        max_steps=updates,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1 if cut else len(rows),
        gradient_accumulation_steps=len(rows) if cut else 1,
        num_generations=len(rows),
        max_completion_length=max(len(row.completion) for row in rows),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"gradient_checkpointing": False} if cut else {}),
    )
    watch: Stopwatch

    class Laps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()

    trainer = GRPOTrainer(
        str(model_dir),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * len(rows)}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[Laps()],
    )
    completions = [torch.tensor(row.completion) for row in rows]
    prompt_ids = torch.tensor([row.prompt for row in rows])
    fixed = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(ids) for ids in completions], batch_first=True),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "num_items_in_batch": torch.tensor(sum(len(ids) for ids in completions)),
    }
    trainer._generate_and_score_completions = lambda _: dict(fixed)
    watch = Stopwatch()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return watch.measured([[log["loss"], float(log["grad_norm"]), log["entropy"]] for log in logs])


def run_side(side: str, model_dir: Path, rows: list[Row], learner: str) -> Measured:
    updates = WARM_UP + MEASURED
    if side.startswith("tandem"):
        options = json.loads(learner) | ({"shared_prompts": "never"} if side == "tandem-unshared" else {})
        return run_tandem(model_dir, rows, updates, options)
    return run_trl(model_dir, rows, updates, cut=side == "trl-cut")


def run_profiled(side: str, *arguments: Any) -> None:
    """Print the CPU time of the updates per operator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run_side(side, *arguments)
    operators = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    total = sum(event.self_cpu_time_total for event in operators)
    print(f"  {side}: self CPU time by operator, {total / 1e6:.1f} s in total")
    for event in sorted(operators, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(
            f"    {event.key.removeprefix('aten::'):50} {event.self_cpu_time_total / total:6.1%} {event.count:6} calls"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("tandem", "tandem-unshared", "trl", "trl-cut"), required=True)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--learner", required=True)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    rows = make_rows(args.rows, args.tokens, args.prompt, ragged=args.ragged)
    if args.profile:
        run_profiled(args.side, args.model_dir, rows, args.learner)
    else:
        print(json.dumps(run_side(args.side, args.model_dir, rows, args.learner)))


if __name__ == "__main__":
    main()
