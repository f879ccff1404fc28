"""Measure the size of deltas in real runs in bfloat16 with a learning rate of 5e-6.

    python tests/bench/delta_run.py [--tasks digits smollm2] [--learning-rate 5e-6]

The completions are a mock generator's. It makes the complete files of each version, and compares their digests with
those of the trainer's complete files. The bench fails if a delta was refused. `digits` has 200
steps, and takes three minutes. SmolLM2-135M has 12 steps, because bfloat16 is slow on CPUs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.trl import TASKS
from support.bench import Table, options, records, train, write
from support.generators import running
from tandem_protocol.chains import is_complete
from tandem_protocol.store import WeightStore

CPUS = (0, 1)
STEPS = {"digits": 200, "smollm2": 12}


def measure(task: str, folder: Path, steps: int, learning_rate: float) -> list[str]:
    """Train, and return a row: how many versions have deltas, and their share of a complete version's bytes."""
    (weights_dir := folder / "weights").mkdir(parents=True)
    model = TASKS[task](folder, quick=False).model
    made = f"--generator.materialize_dir={folder / 'made'}"
    with running("mock", model, weights_dir, made, log=folder / "generator.log") as generator:
        run_dir = train(
            folder / "project", model, weights_dir, [generator.port], cpus=CPUS, max_steps=steps, max_lag=1,
            optim={"learning_rate": learning_rate}, learner={"dtype": "bfloat16"},
            publish={"delta": "always", "keep": steps + 1},
            rollout={"num_prompts": 1, "num_generations": 4, "max_completion_length": 8},
        )  # fmt: skip
    store = WeightStore(weights_dir)
    manifests = [store.read(version)[0] for version in store.versions()]
    deltas = [manifest for manifest in manifests if manifest.deltas.keys() == {file.name for file in manifest.files}]
    shares = [sum(delta.size_bytes for delta in one.deltas.values()) / one.size_bytes for one in deltas]
    assert len(records(run_dir)) == steps
    assert "in full" not in (folder / "project/output.log").read_text(), "a delta was refused"
    assert len(deltas) == steps, "a file was published in full instead of as a delta"
    return [
        task, str(steps), str(sum(is_complete(store, manifest) for manifest in manifests)),
        f"{manifests[0].size_bytes / 1e6:,.2f}", f"{100 * statistics.mean(shares):.2f}", f"{100 * max(shares):.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [
            measure(task, Path(name) / task, 3 if args.quick else STEPS[task], args.learning_rate)
            for task in args.tasks
        ]
    columns = ["task", "deltas", "complete versions", "a complete one, MB", "mean %", "max %"]
    write([Table(title="Deltas of a run", columns=columns, rows=rows)], args.result)


if __name__ == "__main__":
    main()
