"""docs/train/metrics.md explains every field that a run writes, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from anyio.from_thread import start_blocking_portal

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import answer, completion, scored
from support.run_folders import make_run
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.alerts import AlertsConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.errors import StalePolicy, SwitchFailed
from tandem_protocol.messages import Group, RolloutRequest
from tandem_protocol.run_state import FAILED, FINISHED, STOPPED
from tandem_protocol.version import Version
from tandem_rollout.answers import event_of
from tandem_rollout.availability import BACK, LEFT, LOST
from tandem_rollout.completions import CompletionReader
from tandem_rollout.dispatch import Loads
from tandem_rollout.prompts import PromptRow
from tandem_rollout.sampler import Sampler
from tandem_rollout.trajectory import Trajectory
from tandem_trainer import algorithms
from tandem_trainer.algorithms.objectives import LOSS_TYPES
from tandem_trainer.evaluate import Evaluation
from tandem_trainer.learner.learner import Learner
from tandem_trainer.publication import Part, Publication
from tandem_trainer.run.alerts import Alerts
from tandem_trainer.run.events import make_event
from tandem_trainer.run.journal import EVALUATION, NOT_FINITE, Journal
from tandem_trainer.run.measures import Facts
from tandem_trainer.run.token_log import TokenTexts

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "services/trainer/tandem_trainer"
ROLLOUT = ROOT / "services/rollout/tandem_rollout"
PAGE = (ROOT / "docs/train/metrics.md").read_text()

PAIR = [completion([6, 7, 8]), completion([9, 2])]
GROUPS = [scored([4, 5], PAIR, [1.0, 0.0]), scored([5], PAIR, [0.0, 0.5], row=1)]
EVAL = {"prompts": {}, "every_steps": 1, "num_generations": 2, "temperature": 1.0, "pass_at": [1, 2]}
PAIRS = {"rollout": {"num_generations": 2}}
RUNS: dict[str, dict[str, Any]] = {
    **{loss_type: {"grpo": {"loss_type": loss_type, "epsilon_high": 1.5}} for loss_type in LOSS_TYPES},
    "reference": {"grpo": {"beta": 0.1, "num_iterations": 2}},
    "top entropy": {"grpo": {"top_entropy_quantile": 0.5, "off_policy_mask": 1.0}},
    "no correction": {"grpo": {"importance_sampling": "none"}},
    "online_dpo": {"algorithm": "online_dpo", **PAIRS},
    "ipo": {"algorithm": "online_dpo", "online_dpo": {"loss_type": "ipo"}, **PAIRS},
    "lora": {"lora": {"r": 2}},
    "evaluation": {"eval": EVAL, "rollout": {"tools": ["tools:f"]}},
}
"""Every option that adds or removes a field."""
PUBLICATION = Publication(Version(1, 1), Part("full", {}, iter(()), 1000), nullcontext)


class Generator:
    """Answers at once, and gives each completion a reward."""

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        for index in range(len(request.prompts)):
            on_group(answer(PAIR, index))

    async def score(self, row: PromptRow, trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return scored(row.token_ids, PAIR, [1.0, 0.0]).trajectories


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run of one step for each of RUNS."""
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    return {name: _run(tmp_path_factory.mktemp("run"), model, options) for name, options in RUNS.items()}


def _run(folder: Path, model: Path, options: dict[str, Any]) -> Path:
    """Make one step of a run as the loop does, without generators."""
    run = make_run(folder, **options)
    run.token_texts = TokenTexts(make_tokenizer())
    if "lora" in options:
        run.loads = lambda: Loads({"http://generator": 100}, {"http://generator": 20})
    config = TrainerConfig.model_validate({"max_steps": 9, "rewards": [{"function": "rewards:r"}]} | options)
    algorithm = algorithms.build(config)
    shared = SharedConfig(model=str(model))
    accelerator = Accelerator(cpu=True)
    learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=algorithm.needs_reference)
    with run.record_outcome():
        stats = learner.update(algorithm.make_batch(GROUPS, list), algorithm)
        run.published(PUBLICATION.timings([]), 1000)
        run.make_record(1, GROUPS, stats, trained=learner.trained)
        if config.eval:
            run.evaluated(_evaluate(config, run.dir))
        run.log()
    return run.dir


def _evaluate(config: TrainerConfig, folder: Path) -> dict[str, Any] | None:
    generator: Any = Generator()
    with start_blocking_portal() as portal:
        evaluate = Evaluation(
            rows=[PromptRow(0, "row 0", "6*7=", "6*7=", (4,), {})],
            sampler=Sampler(generator, CompletionReader(make_tokenizer()), generator),
            win_rate=None,
            portal=portal,
            wait=lambda task: task.result(),  # type: ignore[union-attr]  # this rank has a task
            config=config,
            write=Journal(folder, is_main=True).evaluation,
            is_main=True,
        )
        return evaluate(Version(1, 1))


def _explained(section: str) -> set[str]:
    """What the first column of the tables below a heading names."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def test_every_field_of_metrics_jsonl_is_explained_and_no_other_is(folders: dict[str, Path]) -> None:
    written: set[str] = set()
    for folder in folders.values():
        for record in _lines(folder / "metrics.jsonl"):
            for name in ("timings", "publish_timings"):
                written |= {f"{name}.{phase}" for phase in record.pop(name)}
            written |= {*record}
    assert written == _explained("metrics.jsonl")


def test_the_real_line_has_the_fields_of_a_line_of_this_release(folders: dict[str, Path]) -> None:
    shown = json.loads(PAGE.partition("## A real line\n")[2].partition("```json\n")[2].partition("```")[0])
    (written,) = _lines(folders["dapo"] / "metrics.jsonl")
    assert list(shown) == list(written)
    assert list(shown["timings"]) == list(written["timings"])


def test_every_field_of_eval_jsonl_is_explained_and_no_other_is(folders: dict[str, Path]) -> None:
    (record,) = _lines(folders["evaluation"] / "eval.jsonl")
    assert set(record) == _explained("eval.jsonl")
    (step,) = _lines(folders["evaluation"] / "metrics.jsonl")
    (row,) = re.findall(r"^\| `eval` \| (.*) \|$", PAGE, re.MULTILINE)
    assert [name for name in step["eval"] if f"`{name}`" not in row] == []


def test_every_field_of_rollouts_jsonl_is_explained_and_no_other_is(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        for record in _lines(folder / "rollouts.jsonl"):
            fields = {f"spans.{name}" for span in record["spans"] for name in span}
            assert {*record, *fields} == _explained("rollouts.jsonl")


def test_every_field_and_kind_of_events_jsonl_is_explained_and_no_other_is() -> None:
    sources = "".join(path.read_text() for folder in (TRAINER, ROLLOUT) for path in folder.rglob("*.py"))
    kinds = set(re.findall(r"(?:\.alert\(|\.note\(|\bevent\(|\bevent=)\s*\"(\w+)\"", sources))
    assert len(kinds) >= 9, "the pattern finds the calls"
    kinds |= {LOST, BACK, LEFT, EVALUATION, FINISHED, STOPPED, FAILED, NOT_FINITE}
    kinds |= {event_of(StalePolicy("")), event_of(SwitchFailed(""))}
    fields = make_event("kind", "info", 1, "m", {}).keys()
    alerts = Alerts(AlertsConfig(learning_rate_zero=1), Facts())
    changes = [*alerts.check({"step": 1, "learning_rate": 0}), *alerts.check({"step": 2, "learning_rate": 1})]
    of_alerts = {name for change in changes for name in change.details}
    assert {*fields, *of_alerts, *kinds} == _explained("events.jsonl")


def test_every_field_and_phase_of_status_json_is_explained(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        assert set(json.loads((folder / "status.json").read_text())) == _explained("status.json")
    sources = "".join(path.read_text() for path in TRAINER.rglob("*.py"))
    phases = set(re.findall(r"\.timer\(\"(\w+)\"\)", sources))
    (row,) = re.findall(r"^\| `phase` \| (.*) \|$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {*phases, FINISHED, STOPPED, FAILED}
