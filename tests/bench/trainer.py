"""Measure time and peak memory of one update, relative to TRL 1.16's GRPOTrainer with the same model, batch and loss.

    python tests/bench/trainer.py [--models small 135m] [--rounds 3] [--rows 8] [--shapes 32+512 512+128] [--ragged]

A shape is the number of tokens of the prompt and of each completion. All rows have the same prompt.

TRL is installed into an environment of its own, with the trainer's locked dependencies. Its training loop runs
unchanged, except that generation returns a fixed batch at once. An update is everything between `on_step_begin` and
`on_step_end`. The side `trl` uses TRL's defaults: the batch in one micro-batch, with gradient checkpointing. The side
`trl-cut` uses micro-batches of one row without checkpointing. The side `tandem-unshared` computes the prompt with each
completion.

Everything runs in float32 on the CPU, with loss `dapo`, beta 0 and AdamW. Each measurement has its own process, and the
sides alternate. A result is the median of the rounds' ratios. Losses, gradient norms and entropies must agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer_update import Measured

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("trainer_update.py")
TRL_PYTHON = ROOT / ".venv-trl/1.16.0/bin/python"
SIDES = ("tandem", "tandem-unshared", "trl-cut", "trl")
MODELS: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # So small that the interpreter, and not arithmetic, takes most of the time, as when a GPU computes.
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    # The shape of SmolLM2-135M, with random weights.
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


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
    python = TRL_PYTHON if side.startswith("trl") else ROOT / ".venv/bin/python"
    # -P: or Python would import the script trl.py beside this one as TRL.
    command = [python, "-P", SIDE, "--side", side, "--model-dir", model_dir, *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    if "--profile" in options:
        print(output, end="")
        return Measured(0, 0, 0, 0, [])
    return Measured(*json.loads(output.splitlines()[-1]))


def compare(name: str, model_dir: Path, rounds: int, sides: list[str], options: list[str]) -> None:
    measured: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            measured[side].append(measure(side, model_dir, options))
            print(f"  {name} {side}: {measured[side][-1]._replace(values=[])}", file=sys.stderr)
    expected = measured[sides[-1]][0].values
    for side in sides:
        for ours, theirs in zip(measured[side][0].values, expected, strict=True):
            assert all(abs(a - b) <= 1e-4 * max(1, abs(b)) for a, b in zip(ours, theirs, strict=True)), (
                f"{side} has loss, gradient norm, entropy {ours}; {sides[-1]} has {theirs}"
            )
    print(f"{name}: {' '.join(options)}; the same losses, gradient norms and entropies")
    for side in sides:
        median = {f: statistics.median(getattr(m, f) for m in measured[side]) for f in Measured._fields[:4]}
        print(
            "  {:15} {seconds:6.2f} s per update, {cpu_seconds:6.2f} s of CPU; peak {peak_mb:5.0f} MB, "
            "{added_mb:5.0f} MB above the loaded model".format(side, **median)
        )
    for side in sides[1:]:
        ratios = {
            field: statistics.median(
                getattr(a, field) / getattr(b, field) for a, b in zip(measured[sides[0]], measured[side], strict=True)
            )
            for field in Measured._fields[:4]
        }
        print(
            "  {} ÷ {}: time {seconds:.2f}, CPU time {cpu_seconds:.2f}, peak memory {peak_mb:.2f}, "
            "memory above the loaded model {added_mb:.2f}".format(sides[0], side, **ratios)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=["32+512", "256+128", "512+128"], help="prompt + completion")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; use few on a busy machine")
    parser.add_argument("--ragged", action="store_true", help="completions of different lengths")
    parser.add_argument("--learner", default="{}", help="trainer.learner of the configuration, as JSON")
    parser.add_argument("--profile", action="store_true", help="print the time per operator instead")
    args = parser.parse_args()
    subprocess.run([ROOT / "scripts/trl_environments"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in itertools.product(args.models, args.shapes):
            model_dir = make_model(name, Path(folder))
            prompt, tokens = shape.split("+")
            numbers = {"rows": args.rows, "prompt": prompt, "tokens": tokens, "threads": args.threads}
            options = [*(f"--{key}={number}" for key, number in numbers.items()), f"--learner={args.learner}"]
            options += ["--ragged"] * args.ragged
            if args.profile:
                for side in args.sides:
                    measure(side, model_dir, [*options, "--profile"])
            else:
                compare(name, model_dir, args.rounds, args.sides, options)


if __name__ == "__main__":
    main()
