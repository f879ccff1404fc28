"""Generators whose answers a test decides, without a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import httpx

from tandem_protocol.messages import PROTOCOL_VERSION, Info, ModelFingerprint, ServedWeights
from tandem_protocol.routes import INFO
from tandem_protocol.version import BASE, Version

DESCRIPTION = Info(
    generator_id="g",
    engine="mock",
    engine_version="1",
    model="m",
    fingerprint=ModelFingerprint(),
    version=BASE,
    devices=(),
    world_size=1,
    max_model_len=32,
    max_num_seqs=1,
)
Handler = Callable[[httpx.Request], Any]


def speaking(handler: Handler, protocol: int = PROTOCOL_VERSION) -> httpx.MockTransport:
    """Return a transport that describes itself with this version of the contract, and asks `handler` to sample.

    A question when a version serves is answered at once: it does.
    """

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == INFO:
            description = DESCRIPTION.model_copy(update={"protocol": protocol})
            return httpx.Response(200, content=description.model_dump_json())
        if "at_least" in request.url.params:
            served = ServedWeights(version=Version.parse(request.url.params["at_least"]), manifest_digest="abc")
            return httpx.Response(200, content=served.model_dump_json())
        response = handler(request)
        given: httpx.Response = await response if inspect.isawaitable(response) else response
        return given

    return httpx.MockTransport(answer)
