"""Trainer and generator of releases that speak different versions of the wire contract."""

from __future__ import annotations

import httpx
import pytest

from tandem_protocol.messages import PROTOCOL_VERSION, Info, ModelFingerprint
from tandem_protocol.version import BASE
from tandem_rollout.client import GeneratorClient
from tandem_rollout.handshake import check_generators

INFO = Info(
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


@pytest.mark.usefixtures("names")
async def test_the_client_names_its_newest_version() -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("protocol"))
        return httpx.Response(200, content=INFO.model_dump_json())

    client = GeneratorClient(["http://127.0.0.1:1"], None, transport=httpx.MockTransport(answer))
    await client.info(5)
    await client.close()
    assert asked == [str(PROTOCOL_VERSION)]


@pytest.mark.parametrize("protocol", range(1, PROTOCOL_VERSION + 1))
def test_a_generator_of_every_version_that_this_release_speaks_is_accepted(protocol: int) -> None:
    info = INFO.model_copy(update={"protocol": protocol})
    ours = ModelFingerprint()
    assert check_generators([info], ["http://a"], ours=ours, model="m", max_completion_length=16, accelerators=()) == 32
