"""The host memory of a published version is pinned, and is not pinned any more when it is freed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from support import gpu
from tandem_trainer.devices import HostMemory

pytestmark = pytest.mark.gpu

SIZE = 1 << 20


def test_memory_that_was_pinned_can_be_used_again():
    for round_ in range(20):
        source = torch.full((SIZE,), round_, dtype=torch.int32, device=gpu.device())
        memory = HostMemory({"w": source}, gpu.device())
        copied = _copied(memory, source)
        assert torch.equal(copied, source.cpu())
        del memory, copied
        again = torch.arange(SIZE, dtype=torch.int32) + round_  # may get the memory that was freed
        assert torch.equal(again.to(gpu.device()).cpu(), again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA pins memory")
def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    source = torch.arange(SIZE, dtype=torch.int32, device=gpu.device())
    flat_N = torch.empty(source.nbytes, dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(flat_N.data_ptr(), flat_N.nbytes, 0)))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch, "empty", lambda *_args, **_kwargs: flat_N)
        memory = HostMemory({"w": source}, gpu.device())
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(flat_N.data_ptr())))
    assert "cannot be pinned" in caplog.text
    assert torch.equal(_copied(memory, source), source.cpu())


def _copied(memory: HostMemory, source: Tensor) -> Tensor:
    copied = memory.copy("w", source)
    memory.wait()
    return copied
