"""vLLM's entry points: registers the weight engine in every process, mounts our routes in the server.

Everything that depends on the kind of device stands here, so that what is tested on CPU is what runs on GPU.
"""

import asyncio
import os
from argparse import Namespace
from typing import ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.protocol import EngineClient
from vllm.platforms import current_platform

from tandem_protocol.store import WeightStore

from .config import Settings
from .engines.vllm import VllmEngine
from .routes import build_router
from .server import end_on_signal, end_when_failed
from .volume_engine import BACKEND
from .weight_switcher import WeightSwitcher


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in the server, the engine core and every worker, perhaps twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "tandem_generator.volume_engine", "VolumeWeightEngine")
    if current_platform.is_cpu():
        from vllm import _custom_ops

        # oneDNN keeps packed copies of the linear weights, which a copy in place would not reach.
        _custom_ops._supports_onednn = False


def devices(world_size: int) -> tuple[str, ...]:
    """UUIDs of the accelerators that an engine of `world_size` ranks computes on, or `cpu:<n>` a core it may use."""
    if current_platform.is_cpu():
        return tuple(f"cpu:{core}" for core in sorted(os.sched_getaffinity(0)))
    return tuple(
        current_platform.get_device_uuid(index) for index in range(min(world_size, current_platform.device_count()))
    )


def takes_seeds() -> bool:
    """A seeded request whose prefill is cut in chunks kills vLLM 0.32's CPU engine: torch's generator has no offset."""
    return not current_platform.is_cpu()


class TandemRoutes:
    """Entry point `vllm.endpoint_plugins`: our router over vLLM's engine client, in vLLM's own server."""

    name = "tandem"
    required_tasks = ("generate",)
    settings: ClassVar[Settings]
    """Set before vLLM makes the plug-in, which it does without arguments."""
    switcher: ClassVar[WeightSwitcher]
    """Knows, when the server has ended, whether it was told to: vLLM's exit status is 0 also when its engine died."""

    def attach_router(self, app: FastAPI) -> None:
        shared, config = self.settings.shared, self.settings.generator
        self.engine = VllmEngine()
        TandemRoutes.switcher = WeightSwitcher(self.engine, WeightStore(shared.weights_dir), config)
        app.include_router(build_router(self.switcher, shared.model))

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        assert engine_client is not None, "the task generate has an engine"
        ranks = engine_client.vllm_config.parallel_config.world_size_across_dp
        self.engine.attach(
            engine_client, devices(ranks), takes_seeds=takes_seeds(), trust_remote_code=args.trust_remote_code
        )
        await self.switcher.start()
        self._watch = asyncio.create_task(self._watch_end(state))

    async def _watch_end(self, state: State) -> None:
        while not (hasattr(state, "server") and state.server.started):  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(0.1)
        # In place of vLLM's handlers, which end the engine first: a request on its way there would never be answered.
        state.server.config.timeout_graceful_shutdown = self.settings.generator.shutdown_timeout_s
        end_on_signal(self.switcher, state.server)
        await end_when_failed(self.switcher, state.server)
