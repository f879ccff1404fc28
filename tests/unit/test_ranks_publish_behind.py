"""Two ranks publish behind an update: each writes its part without the other, and both fail together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anyio.from_thread import start_blocking_portal
from safetensors.torch import load_file

from support.models import make_tiny_model, make_tokenizer
from support.ranks import run_ranks
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import PublishConfig, TrainerConfig
from tandem_protocol.errors import StoreError
from tandem_protocol.store import WeightStore
from tandem_protocol.version import Version
from tandem_trainer import publication
from tandem_trainer.learner.learner import Learner
from tandem_trainer.publish import Publisher, fingerprint_of
from tandem_trainer.ranks import FailedTogether, own_errors, together

CASES = ("ddp", "fsdp2", "fsdp2-lora")


async def nothing(*_: object) -> dict[str, Any]:
    return {}


def publish(model_dir: Path, out: Path) -> None:
    """Run on each rank: publish, change the parameters, publish again; at last, rank 1 cannot write."""
    accelerator = Accelerator(cpu=True)
    client: Any = SimpleNamespace(expect=nothing, set_weights=nothing)
    for case in CASES:
        parallelism, _, lora = case.partition("-")
        options = {"max_steps": 1, "output_dir": out, "rewards": [{"function": "rewards:r"}],
                   "learner": {"parallelism": parallelism}, "lora": {"r": 4} if lora else None}  # fmt: skip
        torch.manual_seed(0)
        config, shared = TrainerConfig.model_validate(options), SharedConfig(model=str(model_dir))
        learner = Learner(shared, config, make_tokenizer(), accelerator, needs_reference=False)
        learner.save(out / f"{case}-before")
        store = WeightStore(out / case)
        with start_blocking_portal() as portal:
            publisher = Publisher(
                store=store, client=client, portal=portal,
                wait=lambda task: together(accelerator, task.result, 60),  # type: ignore[union-attr]  # the task exists on every rank
                config=PublishConfig(keep=9), run_name="r", attempt=1,
                model_fingerprint=fingerprint_of(learner.model, model_dir), dtype=torch.float32,
                accelerator=accelerator,
            )  # fmt: skip # type: ignore[union-attr]
            if accelerator.is_main_process:
                (out / case / "versions").mkdir(parents=True)
            publisher(learner.model, 0)
            publisher(learner.model, 1, behind=True)
            for parameter in learner.model.parameters():
                parameter.data.zero_()
            publisher(learner.model, 2, behind=True)
            publisher.wait()
            error = fails_on_rank_1(publisher, learner)
        (out / f"{case}-{accelerator.process_index}.json").write_text(json.dumps(error))


def fails_on_rank_1(publisher: Publisher, learner: Learner) -> list[str]:
    patched = pytest.MonkeyPatch()

    def fail(*_: object) -> dict[str, str]:
        raise OSError("the disk is broken")

    if not publisher._accelerator.is_main_process:
        patched.setattr(publication, "write_files", fail)
    publisher(learner.model, 3, behind=True)
    with pytest.raises(FailedTogether) as failed:
        publisher.wait()
    patched.undo()
    with pytest.raises((StoreError, OSError)) as own, own_errors():
        raise failed.value
    return [own.typename, str(own.value)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    run_ranks(2, publish, make_tiny_model(folder / "model"), folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_parts_hold_the_weights_from_before_the_update(out: Path, case: str) -> None:
    store = WeightStore(out / case)
    saved = load_all(out / f"{case}-before" / "model")
    for step, factor in ((0, 1.0), (1, 1.0), (2, 0.0)):
        manifest, _ = store.read(Version(step, 1))
        store.verify(manifest)
        shards = [file for file in manifest.files if file.name.endswith(".safetensors")]
        assert len(shards) == (1 if "lora" in case else 2)
        written = load_all(store.directory(manifest.version))
        assert written.keys() == saved.keys()
        assert all(torch.equal(written[name], factor * saved[name]) for name in saved)
        assert not list(store.directory(manifest.version).glob(".*")), "nothing but the version's files"
    assert store.latest() == Version(2, 1)
    assert not list(store.root.glob("versions/.*"))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_cannot_write_fails_with_its_error_and_the_other_with_it(out: Path, case: str) -> None:
    errors = [json.loads((out / f"{case}-{rank}.json").read_text()) for rank in range(2)]
    assert errors[0][0] == "StoreError"
    assert "trainer process 1 could not write its part of version 3.1" in errors[0][1]
    assert errors[1] == ["OSError", "the disk is broken"]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
