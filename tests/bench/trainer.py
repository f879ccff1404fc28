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

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.trainer_update import Measured
from support.bench import Table, options, write

ROOT = Path(__file__).parents[2]
SIDE = Path(__file__).with_name("trainer_update.py")
TRL_PYTHON = ROOT / ".venv-trl/1.16.0/bin/python"
FIELDS = Measured._fields[:4]
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
    command = [str(python), "-P", str(SIDE), "--side", side, "--model-dir", str(model_dir), *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    if "--profile" in options:
        print(output, end="")
        return Measured(0, 0, 0, 0, [])
    return Measured(*json.loads(output.splitlines()[-1]))


def compare(name: str, shape: str, model_dir: Path, rounds: int, sides: list[str], words: list[str]) -> Table:
    """Measure the sides in turns. The first one is compared with each."""
    measured: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            measured[side].append(measure(side, model_dir, words))
            print(f"  {name} {side}: {measured[side][-1]._replace(values=[])}", file=sys.stderr)
    expected = measured[sides[-1]][0].values
    for side in sides:
        for ours, theirs in zip(measured[side][0].values, expected, strict=True):
            assert all(abs(a - b) <= 1e-4 * max(1, abs(b)) for a, b in zip(ours, theirs, strict=True)), (
                f"{side} has loss, gradient norm, entropy {ours}; {sides[-1]} has {theirs}"
            )
    medians = {
        side: Measured(**{field: statistics.median(getattr(one, field) for one in all_) for field in FIELDS}, values=[])
        for side, all_ in measured.items()
    }
    first = medians[sides[0]]
    rows = [
        [
            side,
            f"{one.seconds:.2f}",
            f"{one.cpu_seconds:.2f}",
            f"{one.peak_mb:,.0f}",
            *(f"{getattr(first, field) / getattr(one, field):.2f}" for field in FIELDS),
        ]
        for side, one in medians.items()
    ]
    columns = [
        "side",
        "s",
        "CPU s",
        "peak MB",
        "ours ÷ this: time",
        "CPU time",
        "peak",
        "memory above the loaded model",
    ]
    note = "Losses, gradient norms and entropies agree to 1e-4."
    return Table(title=f"{name}, prompt + completion {shape}", columns=columns, rows=rows, note=note)


def main() -> None:
    parser = options(__doc__)
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
    if args.quick:
        args.models, args.rounds, args.rows, args.shapes = ["tiny"], 1, 2, ["32+32"]
    tables = []
    subprocess.run([ROOT / "scripts/trl_environments"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in itertools.product(args.models, args.shapes):
            model_dir = make_model(name, Path(folder))
            prompt, tokens = shape.split("+")
            numbers = {"rows": args.rows, "prompt": prompt, "tokens": tokens, "threads": args.threads}
            words = [*(f"--{key}={number}" for key, number in numbers.items()), f"--learner={args.learner}"]
            words += ["--ragged"] * args.ragged
            if args.profile:
                for side in args.sides:
                    measure(side, model_dir, [*words, "--profile"])
            else:
                tables.append(compare(name, shape, model_dir, args.rounds, args.sides, words))
    write(tables, args.result)


if __name__ == "__main__":
    main()
