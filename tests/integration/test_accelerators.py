"""Trainer and generator report their accelerators. Fakes replace the GPUs that torch and vLLM would find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.generators import TOKEN, running
from support.models import make_tiny_model
from support.projects import Project

RANK = """
from pathlib import Path
from types import SimpleNamespace as Fake
import torch
from accelerate import Accelerator
from tandem_trainer.devices import all_accelerators
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
torch.cuda.get_device_properties = lambda device: Fake(uuid=f"uuid-{device.index}")
Path(f"rank-{rank}").write_text(" ".join(all_accelerators(Fake(device=torch.device("cuda", rank)))))
accelerator.state.destroy_process_group()
"""


TRAINER = """
import sys
from accelerate.utils import gather_object
import tandem_trainer.__main__ as trainer
import tandem_trainer.process
names = sys.argv.pop(1).split(",")
tandem_trainer.process.all_accelerators = lambda accelerator: gather_object([names[accelerator.process_index]])
sys.exit(trainer.main())
"""


class FourGpus:
    """A fake of vLLM's platform on a host with four GPUs."""

    is_cpu = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 4)
    get_device_uuid = staticmethod(lambda index: f"GPU-{index}")


def run_two_ranks(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "rank.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "TANDEM_TOKEN": TOKEN},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_every_rank_knows_the_accelerators_of_all_ranks(tmp_path: Path) -> None:
    done = run_two_ranks(tmp_path, RANK)
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"rank-{rank}").read_text() for rank in range(2)} == {"GPU-uuid-0 GPU-uuid-1"}


def test_a_rank_that_shares_a_device_with_the_generator_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    weights_dir = tmp_path / "weights"
    weights_dir.mkdir()
    theirs = [f"cpu:{core}" for core in sorted(os.sched_getaffinity(0))]  # CPU cores stand for GPUs here
    with running("mock", model, weights_dir, log=tmp_path / "generator.log") as generator:
        project = Project(tmp_path / "project", model, generator, weights_dir)
        config = str(project.directory / "config.yaml")
        done = run_two_ranks(tmp_path, TRAINER, f"GPU-a,{theirs[0]}", "--config", config)
    assert done.returncode != 0
    lists = f"computes on {', '.join(theirs)} and the trainer on GPU-a, {theirs[0]}. Both use {theirs[0]},"
    assert lists in done.stderr, done.stderr
    assert not (project.run_dir / "metrics.jsonl").exists()


@pytest.mark.vllm
def test_a_generator_names_the_gpus_that_it_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem_generator import plugin

    monkeypatch.setattr(plugin, "current_platform", FourGpus)
    assert plugin.devices(world_size=2) == ("GPU-0", "GPU-1")
    assert plugin.devices(world_size=8) == ("GPU-0", "GPU-1", "GPU-2", "GPU-3"), "the others are on other hosts"
