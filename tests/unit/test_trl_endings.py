"""What is left behind when the training of a TRL script ends early: `status.json`, the log, and the signal handlers.

A trainer of transformers stands for TRL's.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tandem_trainer.run import stopping
from tandem_trainer.run.stopping import StopRequest
from tandem_trainer.trl import takeover
from tandem_trainer.trl.recorder import RecordedClient, Tally
from tandem_trainer.trl.start import Start

STEPS = 4


class Model(nn.Module):
    """Calls `at_step[N]` in step N."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.step = 0
        self.at_step: dict[int, Callable[[], None]] = {}

    def forward(self, x: torch.Tensor, return_loss: bool = True) -> dict[str, torch.Tensor]:
        self.step += 1
        self.at_step.get(self.step, lambda: None)()
        return {"loss": (self.weight * x).mean()}


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """Return the handlers of signals. They are restored after the test."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: dict[int, Any]) -> Callable[[Start | None], Any]:
    """Return a function that makes a trainer. Its `_move_model_to_vllm` publishes, as in old versions of TRL."""

    def make(start: Start | None, **options: Any) -> Any:
        for method in ("__init__", "train"):
            monkeypatch.setattr(Trainer, method, getattr(Trainer, method))
        members = {"original": object, "tally": Tally(), "run_dir": tmp_path / "run", "stop": StopRequest()}
        client: Any = type("Client", (RecordedClient,), members)
        takeover._wrap_trainers(client, start, "1.16.0")
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"), "max_steps": STEPS, "per_device_train_batch_size": 1,
                "use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
            } | options,
        )  # fmt: skip
        args.use_vllm = True
        rows: Any = [{"x": torch.ones(1)}] * STEPS
        trainer: Any = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows)
        trainer.wait = client.stop.wait
        trainer._move_model_to_vllm = lambda: trainer.wait(done())
        return trainer

    return make


def done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def phase(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "run/status.json").read_text())["phase"]


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("start", [None, Start()], ids=["use()", "program"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("the reward failed"), "failed"),
        (SystemExit(3), "failed"),
        (SystemExit("no data"), "failed"),
        (SystemExit(0), "stopped"),
        (KeyboardInterrupt(), "stopped"),
    ],
    ids=repr,
)
def test_an_error_in_a_step_is_the_last_status_and_leaves_the_signals_to_the_script(
    tmp_path: Path, make: Any, handlers: dict[int, Any], start: Start | None, error: BaseException, expected: str
) -> None:
    trainer = make(start)
    trainer.model.at_step[2] = failing(error)
    with pytest.raises(type(error)):
        trainer.train()
    assert phase(tmp_path) == expected
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_training_that_reaches_its_end_is_finished(tmp_path: Path, make: Any) -> None:
    make(Start()).train()
    assert phase(tmp_path) == "finished"


@pytest.mark.parametrize(("is_highest_best", "best_step"), [(True, 1), (False, STEPS)])
def test_the_weights_of_the_best_checkpoint_are_the_last_that_are_published(
    make: Any, is_highest_best: bool, best_step: int
) -> None:
    """The loss falls with each step. An evaluation publishes too, as TRL's does."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": is_highest_best}
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(None, **best, **every_step, label_names=[], learning_rate=0.1, lr_scheduler_type="constant")
    published, evaluate = [], trainer.evaluate

    def publish() -> None:
        published.append(trainer.model.weight.item())

    def publish_and_evaluate(*arguments: Any, **options: Any) -> Any:
        publish()
        trainer._last_loaded_step = trainer.state.global_step
        return evaluate(*arguments, **options)

    trainer._move_model_to_vllm, trainer.evaluate = publish, publish_and_evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best_step}")
    assert published[-1] == trainer.model.weight.item() == published[best_step - 1]
    assert len(published) == (STEPS if best_step == STEPS else STEPS + 1), "what is served is not published again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("grace_s", [60.0, -1.0], ids=["in time", "after the grace"])
def test_a_signal_leaves_a_checkpoint_also_if_the_last_publish_comes_too_late(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int, grace_s: float
) -> None:
    monkeypatch.setattr(stopping, "STOP_GRACE_S", grace_s)
    trainer = make(Start())
    trainer._move_model_to_vllm = lambda: trainer.wait(done() if grace_s > 0 else Future())
    trainer.model.at_step[2] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + number
    assert (tmp_path / "out/checkpoint-2/trainer_state.json").exists()
    assert phase(tmp_path) == "stopped"
    assert "without a new checkpoint" not in caplog.text


def test_a_signal_in_a_step_that_waits_for_generators_stops_without_a_checkpoint(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, handlers: dict[int, Any]
) -> None:
    monkeypatch.setattr(stopping, "STOP_GRACE_S", -1.0)
    trainer = make(Start())

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer.wait(Future())

    trainer.model.at_step[2] = wait
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert not (tmp_path / "out/checkpoint-2").exists()
    assert phase(tmp_path) == "stopped"
    assert "without a new checkpoint" in caplog.text
    assert {number: signal.getsignal(number) for number in handlers} == handlers
