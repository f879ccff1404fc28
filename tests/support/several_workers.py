"""Several workers under vLLM's own executor, in this process. What they load is scripted.

vLLM starts a process for each worker, and message queues in shared memory. Here, both are lists.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.worker import gpu_worker

from tandem_generator.engines.vllm import VllmEngine
from tandem_generator.vllm_worker import TandemWorker

from .engines import FACTS


class Transfer:
    """In place of `VolumeWeightEngine`: notes what a worker holds, and fails as often as it is asked to."""

    def __init__(self) -> None:
        self.holds: list[str] = []
        self.failures = 0
        self.error = "the device is lost"

    def init_transfer_engine(self, _: object) -> None:
        self._fail_if_due("this kind of model")

    def parse_init_info(self, info: dict[str, Any]) -> dict[str, Any]:
        return info

    def update_weights(self, update: dict[str, list[str]]) -> None:
        self.holds = []  # a load that breaks leaves a mixture
        self._fail_if_due(self.error)
        self.holds = update["shards"]

    def _fail_if_due(self, message: str) -> None:
        if self.failures:
            self.failures -= 1
            raise ValueError(message)

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def reset_weight_update_target(self) -> None: ...


class Worker(gpu_worker.Worker, TandemWorker):
    """vLLM's worker without a device."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.vllm_config = SimpleNamespace(weight_transfer_config=True)
        self.weight_transfer_engine = Transfer()
        self._weight_update_active = False
        self.model_runner = SimpleNamespace(reset_lora_state=lambda: None, add_lora=self._add_lora)

    def _add_lora(self, request: Any) -> bool:
        self.weight_transfer_engine.update_weights({"shards": [request.lora_path]})
        return True


def executor(workers: Sequence[Worker]) -> MultiprocExecutor:
    """Return vLLM's executor of these workers. Each has a queue for its answers, as in vLLM."""
    processes = []
    for worker in workers:
        process = WorkerProc.__new__(WorkerProc)
        process.worker, process.rank, process.use_async_scheduling = worker, worker.rank, False
        process.worker_response_mq = _Queue()
        processes.append(process)

    def broadcast(request: Any) -> None:
        for process in processes:
            process._execute_worker_rpc(request)

    under_test = MultiprocExecutor.__new__(MultiprocExecutor)
    under_test.rpc_broadcast_mq = SimpleNamespace(enqueue=broadcast)
    under_test.response_mqs = [process.worker_response_mq for process in processes]
    under_test.is_failed, under_test.futures_queue = False, deque()
    return under_test


class _Queue:
    def __init__(self) -> None:
        self._answers: deque[Any] = deque()

    def enqueue(self, answer: Any) -> None:
        self._answers.append(answer)

    def dequeue(self, timeout: float | None) -> Any:
        return self._answers.popleft()


class SeveralEngines:
    """In place of vLLM's client of one engine or, with data parallelism, of several."""

    def __init__(self, engines: int, workers: int) -> None:
        self.workers = [[Worker(rank) for rank in range(workers)] for _ in range(engines)]
        self.engine_core = self.renderer = self
        self.version = ""
        self._executors = [executor(of_one) for of_one in self.workers]

    async def call_utility_all_async(self, method: str, *arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*(self._call(one, method, arguments) for one in self._executors)))

    async def _call(self, under_test: MultiprocExecutor, method: str, arguments: Sequence[Any]) -> Any:
        await asyncio.sleep(0)
        return getattr(under_test, method)(*arguments)

    async def update_weight_version(self, version: str) -> None:
        self.version = version

    async def clear_mm_cache_async(self) -> None: ...

    async def pause_scheduler_async(self, **_: object) -> None: ...

    async def resume_generation(self) -> None: ...


def engine_of(client: SeveralEngines, *, kind: Literal["full", "lora"] = "full") -> VllmEngine:
    """Return the engine under test. Its rehearsal of rollouts is left out."""
    engine = VllmEngine()
    engine._client, engine._adapter, engine._takes_seeds = client, None, False
    engine.facts = FACTS._replace(kinds=frozenset({kind}), max_lora_rank=8)
    return engine


def without_config() -> AbstractContextManager[object]:
    """vLLM's workers enter their configuration for the time of a load. These have none."""
    return mock.patch.object(gpu_worker, "set_current_vllm_config", return_value=nullcontext())
