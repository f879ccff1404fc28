"""What the benches share: their options, measurements in turns, the tables that they write, and runs of the trainer."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from support.generators import TOKEN

T = TypeVar("T")
RUN_TIMEOUT_S = 900
REWARDS = "def distinct(completions, **columns):\n    return [float(len(set(c))) for c in completions]\n"
"""A reward that differs between completions, whatever the model writes."""
ROWS: tuple[dict[str, Any], ...] = tuple({"prompt": f"{n}+{n}="} for n in range(10, 99))


class Table(BaseModel):
    """Figures of a bench, as a page shows them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every bench."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: it shows that all works, not how fast")
    parser.add_argument("--result", type=Path, help="write the tables as JSON into this file")
    return parser


def write(tables: Sequence[Table], result: Path | None) -> None:
    """Print the tables, and write them into the file of `--result`."""
    for table in tables:
        print(table.markdown(), flush=True)
    if result:
        result.write_text(json.dumps([table.model_dump() for table in tables]))


def alternate(sides: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1) -> dict[str, list[T]]:
    """Measure the sides in turns, A B A B, so that a slow phase of the machine affects all. Drops the first rounds."""
    measured: dict[str, list[T]] = {name: [] for name in sides}
    for round_ in range(warm_up + rounds):
        for name, side in sides.items():
            value = side()
            if round_ >= warm_up:
                measured[name].append(value)
    return measured


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the ratio of two medians as a cell of a table."""
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}"


def train(
    folder: Path,
    model: Path,
    weights_dir: Path,
    ports: Sequence[int],
    *,
    cpus: Sequence[int],
    rewards: str = REWARDS,
    function: str = "distinct",
    rows: Sequence[Mapping[str, Any]] = ROWS,
    **trainer: Any,
) -> Path:
    """Run Tandem's trainer on these CPUs, in a new folder. Returns the folder of the run."""
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "rewards.py").write_text(rewards)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    config = {
        "shared": {"model": str(model), "weights_dir": str(weights_dir), "generators": urls},
        "trainer": {
            "run_name": "bench",
            "rewards": [{"function": f"rewards:{function}"}],
            "checkpoint": {"every_steps": trainer["max_steps"]},
            **trainer,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_on(cpus, [sys.executable, "-m", "tandem_trainer", "--config", folder / "config.yaml"], folder)
    return folder / "runs/bench"


def run_on(cpus: Sequence[int], command: Sequence[object], folder: Path, **environment: str) -> None:
    """Run a command on these CPUs, with a thread for each, until it ends. Its output is in `output.log`."""
    threads = {"OMP_NUM_THREADS": str(len(cpus)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["taskset", "--cpu-list", ",".join(map(str, cpus)), *map(str, command)],
        cwd=folder,
        env={**os.environ, "TANDEM_TOKEN": TOKEN, **threads, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    (folder / "output.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`."""
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
