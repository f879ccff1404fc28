"""Time and peak memory of one update ÷ those of TRL 1.16's GRPOTrainer, on the same model, batch and loss.

    python tests/bench/trainer.py [--models small 135m] [--rounds 3] [--rows 8] [--tokens 512] [--ragged] [--profile]

TRL lives in an environment of its own, .venv-trl, which this makes, with the trainer's own locks. Its training loop
runs unchanged but for generation, which returns the batch at once, so an update is everything from `on_step_begin` to
`on_step_end`. `trl` has TRL's defaults: the batch in one piece, gradient checkpointing. `trl-cut` is cut as ours is:
one row a piece, no checkpointing. float32 on CPU; loss `dapo`, beta 0, AdamW. Each measurement is a process of its own;
the sides take turns, and a figure is the median of the rounds' ratios. Losses, gradient norms and entropies must
agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TRL_ENV, TRL = ROOT / ".venv-trl", "trl==1.16.0"
MODELS: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # SmolLM2-135M's, with random weights
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
PROMPT_LENGTH, LEARNING_RATE = 32, 1e-5
WARM_UP, MEASURED = 1, 1


class Row(NamedTuple):
    prompt: list[int]
    completion: list[int]
    advantage: float


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Of the whole process."""
    added_mb: float
    """Of that, over the level at which the model is loaded and the optimizer is made."""
    values: list[list[float]]
    """Loss, gradient norm and mean entropy of each update."""


# -- one process: either side ----------------------------------------------------------------------------------------


def make_rows(rows: int, tokens: int, *, ragged: bool) -> list[Row]:
    """Random ones; completions of `tokens` tokens, or of anything between an eighth of that and that."""
    rng = random.Random(0)
    vocabulary = range(3, 8192)
    return [
        Row(
            rng.choices(vocabulary, k=PROMPT_LENGTH),
            rng.choices(vocabulary, k=rng.randint(tokens // 8, tokens) if ragged and row else tokens),
            rng.gauss(0, 1),
        )
        for row in range(rows)
    ]


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


class Stopwatch:
    """Wall and CPU seconds of each update, and memory from its making on."""

    def __init__(self) -> None:
        self._before_mb = status_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
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


def run_tandem(model_dir: Path, rows: list[Row], updates: int, learner: str) -> Measured:
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from tandem_protocol.config import SharedConfig
    from tandem_protocol.messages import Completion, VersionSpan
    from tandem_protocol.version import Version
    from tandem_trainer import batch
    from tandem_trainer.algorithms.grpo import Grpo
    from tandem_trainer.config import TrainerConfig
    from tandem_trainer.learner import Learner

    config = TrainerConfig.model_validate(
        {
            "max_steps": 1000,
            "rewards": [{"function": "rewards:r"}],
            "optim": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
            "grpo": {"importance_sampling": "none"},  # as TRL has it without vLLM
            "learner": json.loads(learner),
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    policy = Learner(
        SharedConfig(model=str(model_dir)), config, tokenizer, Accelerator(cpu=True), needs_reference=False
    )
    algorithm = Grpo(config)
    watch, values = Stopwatch(), []
    for _ in range(updates):
        watch.begin()
        trained = batch.pad(
            [
                batch.Row(
                    prompt,
                    Completion(
                        token_ids=tuple(completion),
                        logprobs=(-1.0,) * len(completion),
                        finish_reason="stop",
                        versions=(VersionSpan(version=Version(0, 1), tokens=len(completion)),),
                    ),
                    advantage,
                    in_loss=True,
                )
                for prompt, completion, advantage in rows
            ],
            row_total=len(rows),
            token_total=sum(len(row.completion) for row in rows),
        )
        stats = policy.update(trained, algorithm)
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
    if side == "tandem":
        return run_tandem(model_dir, rows, updates, learner)
    return run_trl(model_dir, rows, updates, cut=side == "trl-cut")


def run_profiled(side: str, *arguments: Any) -> None:
    """Print where the updates' CPU time goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run_side(side, *arguments)
    operators = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    total = sum(event.self_cpu_time_total for event in operators)
    print(f"  {side}: self CPU time by operator, {total / 1e6:.1f} s in all")
    for event in sorted(operators, key=lambda event: -event.self_cpu_time_total)[:12]:
        print(
            f"    {event.key.removeprefix('aten::'):50} {event.self_cpu_time_total / total:6.1%} {event.count:6} calls"
        )


# -- the parent ------------------------------------------------------------------------------------------------------


def make_trl_env() -> None:
    if (TRL_ENV / "ready").exists():
        return
    print(f"Installing {TRL} into {TRL_ENV} …", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", TRL_ENV], check=True)
    env = {**os.environ, "PIP_QUIET": "1", "PATH": f"{TRL_ENV / 'bin'}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    lock = ROOT / "docker/requirements/trainer-cpu.txt"
    subprocess.run([ROOT / "docker/install", lock], env=env, check=True, stdout=sys.stderr)
    subprocess.run([TRL_ENV / "bin/pip", "install", "--quiet", "--no-deps", TRL], check=True)
    (TRL_ENV / "ready").touch()


def make_model(name: str, folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from support.models import make_tokenizer

    shape = MODELS[name]
    LlamaForCausalLM(
        LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / name)
    return folder / name


def measure(side: str, model_dir: Path, options: list[str]) -> Measured:
    python = (TRL_ENV if side.startswith("trl") else ROOT / ".venv") / "bin/python"
    command = [python, __file__, "--side", side, "--model-dir", model_dir, *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    if "--profile" in options:
        print(output, end="")
        return Measured(0, 0, 0, 0, [])
    return Measured(*json.loads(output.splitlines()[-1]))


def compare(name: str, model_dir: Path, rounds: int, options: list[str]) -> None:
    sides: dict[str, list[Measured]] = {"tandem": [], "trl": [], "trl-cut": []}
    for _ in range(rounds):
        for side, measured in sides.items():
            measured.append(measure(side, model_dir, options))
            print(f"  {name} {side}: {measured[-1]._replace(values=[])}", file=sys.stderr)
    expected = sides["trl"][0].values
    for side in sides:
        for ours, theirs in zip(sides[side][0].values, expected, strict=True):
            assert all(abs(a - b) <= 1e-4 * max(1, abs(b)) for a, b in zip(ours, theirs, strict=True)), (
                f"{side} has loss, gradient norm, entropy {ours}; trl has {theirs}"
            )
    print(f"{name}: {' '.join(options)}; the same losses, gradient norms and entropies")
    for side, measured in sides.items():
        median = {f: statistics.median(getattr(m, f) for m in measured) for f in Measured._fields[:4]}
        print(
            "  {:8} {seconds:6.2f} s an update, {cpu_seconds:6.2f} s of CPU; peak {peak_mb:5.0f} MB, "
            "{added_mb:5.0f} of them over the loaded model".format(side, **median)
        )
    for side in ("trl", "trl-cut"):
        ratios = {
            field: statistics.median(
                getattr(a, field) / getattr(b, field) for a, b in zip(sides["tandem"], sides[side], strict=True)
            )
            for field in Measured._fields[:4]
        }
        print(
            "  tandem ÷ {}: time {seconds:.2f}, CPU time {cpu_seconds:.2f}, peak memory {peak_mb:.2f}, "
            "of it over the loaded model {added_mb:.2f}".format(side, **ratios)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="more of them wait for each other on a busy machine")
    parser.add_argument("--ragged", action="store_true", help="completions of different lengths")
    parser.add_argument("--learner", default="{}", help="trainer.learner of the configuration, as JSON")
    parser.add_argument("--profile", action="store_true", help="say where the time goes instead")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        import torch

        torch.set_num_threads(args.threads)
        rows = make_rows(args.rows, args.tokens, ragged=args.ragged)
        if args.profile:
            run_profiled(args.side, args.model_dir, rows, args.learner)
        else:
            print(json.dumps(run_side(args.side, args.model_dir, rows, args.learner)))
        return
    make_trl_env()
    numbers = {"rows": args.rows, "tokens": args.tokens, "threads": args.threads, "learner": args.learner}
    options = [*(f"--{name}={number}" for name, number in numbers.items()), *["--ragged"] * args.ragged]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model_dir = make_model(name, Path(folder))
            if args.profile:
                for side in ("tandem", "trl"):
                    measure(side, model_dir, [*options, "--profile"])
            else:
                compare(name, model_dir, args.rounds, options)


if __name__ == "__main__":
    main()
