"""What trainer and generator say of their accelerators, where torch and vLLM find some that are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
from pathlib import Path
from types import SimpleNamespace as Fake
import torch
from accelerate import Accelerator
from tandem_trainer.__main__ import all_accelerators
rank = Accelerator(cpu=True).process_index
torch.cuda.get_device_properties = lambda device: Fake(uuid=f"uuid-{device.index}")
Path(f"rank-{rank}").write_text(" ".join(all_accelerators(Fake(device=torch.device("cuda", rank)))))
"""


class FourGpus:
    """vLLM's platform of a host with four GPUs."""

    is_cpu = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 4)
    get_device_uuid = staticmethod(lambda index: f"GPU-{index}")


def test_every_rank_knows_the_accelerators_of_all(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(ranks, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"rank-{rank}").read_text() for rank in range(2)} == {"GPU-uuid-0 GPU-uuid-1"}


@pytest.mark.vllm
def test_a_generator_names_the_gpus_that_it_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem_generator import plugin

    monkeypatch.setattr(plugin, "current_platform", FourGpus)
    assert plugin.devices(world_size=2) == ("GPU-0", "GPU-1")
    assert plugin.devices(world_size=8) == ("GPU-0", "GPU-1", "GPU-2", "GPU-3"), "the others are on other hosts"
