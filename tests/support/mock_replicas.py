"""Mock generators with real HTTP servers in this process, which can be killed and started again in milliseconds."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from tandem_generator.engines.mock import MockEngine
from tandem_generator.routes import build_router
from tandem_generator.weight_switcher import WeightSwitcher
from tandem_protocol.config.generator import FaultsConfig, GeneratorConfig
from tandem_protocol.errors import TandemError
from tandem_protocol.store import WeightStore

NO_FAULTS = FaultsConfig()


class Replica:
    """A generator on a port of its own. All methods are called in one event loop."""

    def __init__(
        self,
        port: int,
        store: WeightStore,
        faults: FaultsConfig = NO_FAULTS,
        seed: int = 0,
        *,
        model: str = "",
        max_model_len: int | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self._store = store
        self._faults = faults
        self._chance = random.Random(seed)
        self._model = model
        self._max_model_len = max_model_len

    async def start(self) -> None:
        """Start as a new process would: with the newest version in the store."""
        config = GeneratorConfig(engine="mock", generator_id=f"replica-{self.port}")
        engine = MockEngine(self._model, config.mock.model_copy(update={"faults": self._faults}), self._max_model_len)
        engine._chance = self._chance  # else every start of every replica would have the same faults
        self._faults = self._faults.model_copy(update={"load_failures": 0})  # at the first start only
        self.switcher = WeightSwitcher(engine, self._store, config)
        try:
            await self.switcher.start()
        except TandemError:  # the only version cannot be loaded; a supervisor starts the process again
            await self.start()
            return
        app = FastAPI()
        app.include_router(build_router(self.switcher, self._model))
        self.answered = 0
        """Requests for rollouts that were answered completely since the start."""
        self._killed = killed = asyncio.Event()

        async def until_killed(scope: Any, receive: Any, send: Any) -> None:
            if killed.is_set():  # on a connection that was accepted while the server was killed
                raise ConnectionAbortedError
            await app(scope, receive, send)
            self.answered += scope["method"] == "POST"

        self._server = uvicorn.Server(
            uvicorn.Config(until_killed, lifespan="off", log_config=None, log_level="critical")
        )
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            assert not self._serving.done(), "the server has ended"
            await asyncio.sleep(0.001)

    async def kill(self) -> None:
        """End without an answer to any request."""
        self._killed.set()
        for connection in [*self._server.server_state.connections]:
            connection.transport.abort()
        self._serving.cancel()
        with suppress(asyncio.CancelledError):
            await self._serving
        self._server.force_exit = True
        await self._server.shutdown(sockets=[self._socket])
        await self.switcher.close()
