"""Runs of single turns give the metrics, evaluations and rollouts that they gave before there were episodes.

`golden/single-turn-runs.json` was recorded with the last commit before trajectories took the place of completions. The
mock and the data are the same on every machine, but the last digits of a figure of torch depend on the processor.

With TANDEM_GOLDEN=write the test records the file again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from support.forked import start_trainer
from support.mock_replicas import Replica
from support.models import make_tiny_model
from support.ports import free_port
from support.projects import Project
from tandem_protocol.store import WeightStore

FILE = Path(__file__).parents[1] / "golden" / "single-turn-runs.json"
SMALL_BATCHES: dict[str, Any] = {"learner": {"max_tokens_per_micro_batch": 40}}
EVAL = {"prompts": {"limit": 3}, "every_steps": 2, "num_generations": 4, "temperature": 1.0, "pass_at": [1, 4]}
OVERLONG = "tandem_rollout.rewards:soft_overlong_punishment"
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"eval": EVAL},
    "gspo": SMALL_BATCHES
    | {
        "grpo": {
            "level": "sequence",
            "importance_sampling": "sequence_truncate",
            "off_policy_mask": 0.5,
            "num_iterations": 2,
            "loss_type": "grpo",
        }
    },
    "vespo": SMALL_BATCHES | {"grpo": {"loss_type": "vespo", "beta": 0.04, "top_entropy_quantile": 0.5}},
    "luspo": {
        "grpo": {"loss_type": "luspo", "mask_truncated_completions": True, "scale_rewards": "batch"},
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 30},
    },
    "gdpo": {
        "grpo": {"loss_type": "dr_grpo", "multi_objective_aggregation": "normalize_then_sum"},
        "rewards": [
            {"function": "odd_rewards:odd"},
            {"function": OVERLONG, "weight": 0.5, "arguments": {"max_completion_length": 12, "cache_length": 10}},
        ],
    },
    "dpo": SMALL_BATCHES
    | {
        "algorithm": "online_dpo",
        "online_dpo": {"missing_eos_penalty": 0.1},
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_completion_length": 12},
    },
}
STEPS = 4
TIMED = {"timings", "tokens_per_s"}
OF_ROLLOUTS = ("step", "row", "prompt", "completion", "reward", "rewards", "versions", "skipped")
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def run(portal: BlockingPortal, model: Path, folder: Path, trainer: dict[str, Any]) -> Project:
    """Make a run with a mock generator and a store of its own."""
    store = WeightStore(folder / "weights")
    store.root.mkdir()
    replica: Any = Replica(free_port(), store, model=str(model))
    portal.call(replica.start)
    project = Project(folder / "project", model, replica, store.root, max_steps=STEPS, **trainer)
    ended = start_trainer(project.directory / "config.yaml", folder / "trainer.log")
    ended.join(TIMEOUT_S)
    portal.call(replica.kill)
    assert ended.exitcode == 0, (folder / "trainer.log").read_text()
    return project


def recorded(project: Project) -> dict[str, Any]:
    evaluations = project.lines("eval.jsonl") if (project.run_dir / "eval.jsonl").exists() else []
    return {
        "metrics": [{k: v for k, v in line.items() if k not in TIMED} for line in project.lines("metrics.jsonl")],
        "eval": evaluations,
        "rollouts": [{key: line[key] for key in OF_ROLLOUTS} for line in project.lines("rollouts.jsonl")],
    }


def differences(got: Any, expected: Any, where: str = "") -> list[str]:
    """What of `expected` is not in `got`. A field that was added since is none."""
    if isinstance(expected, dict) and isinstance(got, dict):
        return [d for k, v in expected.items() for d in differences(got.get(k, "nothing"), v, f"{where}.{k}")]
    if isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        return [
            d for i, pair in enumerate(zip(got, expected, strict=True)) for d in differences(*pair, f"{where}[{i}]")
        ]
    same = pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected
    return [] if got == same else [f"{where}: got {got}, expected {expected}"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_single_turns_is_the_same_as_before_episodes(
    portal: BlockingPortal, model: Path, tmp_path: Path, case: str
) -> None:
    got = recorded(run(portal, model, tmp_path, CASES[case]))
    golden = json.loads(FILE.read_text())
    if os.environ.get("TANDEM_GOLDEN") == "write":
        write(golden | {case: got})
        return
    assert differences(got, golden[case]) == []


def write(golden: dict[str, Any]) -> None:
    """Write one line per record."""
    cases = []
    for case, files in golden.items():
        lines = [
            f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(record)}" for record in records) + "]"
            for name, records in files.items()
        ]
        cases.append(f' "{case}": {{\n' + ",\n".join(lines) + "}")
    FILE.write_text("{\n" + ",\n".join(cases) + "}\n")
