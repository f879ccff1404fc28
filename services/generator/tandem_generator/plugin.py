"""Plug-ins for vLLM: register the weight engine in every process, and add Tandem's routes to the server.

All code that differs between CPU and GPU is in this module, so tests on a CPU cover the code that runs on a GPU.
"""

import asyncio
import os
from argparse import Namespace
from typing import ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.config import ModelConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.protocol import EngineClient
from vllm.platforms import current_platform

from tandem_protocol.config.generator import GeneratorSettings
from tandem_protocol.store import WeightStore

from .engines.vllm import VllmEngine
from .routes import build_router
from .server import end_on_signal, end_when_failed
from .vllm_routes import REPLACED, build_vllm_routes
from .volume_engine import BACKEND
from .weight_switcher import WeightSwitcher


def register() -> None:
    """Entry point `vllm.general_plugins`. vLLM calls it in every process, sometimes twice."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        engine = "RepackingVolumeWeightEngine" if current_platform.is_cpu() else "VolumeWeightEngine"
        WeightTransferEngineFactory.register_engine(BACKEND, "tandem_generator.volume_engine", engine)
    if current_platform.is_cpu():
        from vllm import _custom_ops

        # oneDNN keeps packed copies of the linear weights, which a switch would not update.
        _custom_ops._supports_onednn = False


def devices(world_size: int) -> tuple[str, ...]:
    """Return the devices of an engine with `world_size` ranks: UUIDs of GPUs, or `cpu:<n>` for each usable core."""
    if current_platform.is_cpu():
        return tuple(f"cpu:{core}" for core in sorted(os.sched_getaffinity(0)))
    return tuple(
        current_platform.get_device_uuid(index) for index in range(min(world_size, current_platform.device_count()))
    )


def takes_seeds() -> bool:
    """Whether requests may have seeds.

    On CPUs, a seed crashes vLLM 0.32 if the prefill of the request is split: torch's CPU generator has no offset.
    """
    return not current_platform.is_cpu()


def limit_logprobs(model: ModelConfig) -> None:
    """Have vLLM refuse a request for more logprobs per token than the vocabulary has tokens.

    vLLM 0.32 does not compare them, and its engine fails.
    """
    model.max_logprobs = min(model.max_logprobs, model.get_vocab_size())


class TandemRoutes:
    """Entry point `vllm.endpoint_plugins`: adds Tandem's routes to vLLM's server, on top of vLLM's engine client."""

    name = "tandem"
    required_tasks = ("generate",)
    settings: ClassVar[GeneratorSettings]
    """Must be set before vLLM creates the plug-in, because vLLM passes no arguments."""
    switcher: ClassVar[WeightSwitcher]
    """Its `stopping` tells whether the server was stopped. vLLM's exit status is 0 even if the engine died."""

    def attach_router(self, app: FastAPI) -> None:
        shared, config = self.settings.shared, self.settings.generator
        self.engine = VllmEngine()
        TandemRoutes.switcher = WeightSwitcher(self.engine, WeightStore(shared.weights_dir), config)
        app.include_router(build_router(self.switcher, shared.model))
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in REPLACED]
        app.include_router(build_vllm_routes(self.switcher, shared.model))

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        assert engine_client is not None, "vLLM passes an engine for the task generate"
        limit_logprobs(engine_client.model_config)
        ranks = engine_client.vllm_config.parallel_config.world_size_across_dp
        self.engine.attach(
            engine_client, devices(ranks), takes_seeds=takes_seeds(), trust_remote_code=args.trust_remote_code
        )
        await self.switcher.start()
        self._watch = asyncio.create_task(self._watch_end(state))

    async def _watch_end(self, state: State) -> None:
        while not (hasattr(state, "server") and state.server.started):  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(0.1)
        # Replace vLLM's signal handlers: they stop the engine first, so waiting requests would get no answer.
        state.server.config.timeout_graceful_shutdown = self.settings.generator.shutdown_timeout_s
        end_on_signal(self.switcher, state.server)
        await end_when_failed(self.switcher, state.server)
