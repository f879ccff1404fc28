"""A name with several addresses means several replicas, which may disappear and come back during a wait."""

from __future__ import annotations

import httpx
import pytest

from tandem_protocol.messages import ServedWeights, SetWeights
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.replicas import Replicas

V1 = Version(1, 1)
Names = dict[str, list[str]]


async def test_each_address_of_a_name_is_a_replica_and_a_name_with_one_address_is_kept(names: Names):
    names |= {"generator": ["10.0.0.3", "10.0.0.2"], "single": ["10.0.0.9"]}
    urls = ("http://generator:8000", "http://single:8000", "https://generator", "http://gone:8000")
    assert await Replicas(urls).now() == ("http://10.0.0.2:8000", "http://10.0.0.3:8000", *urls[1:])


async def test_replicas_may_disappear_and_appear_during_a_wait(names: Names):
    names["generator"] = ["10.0.0.2", "10.0.0.3"]
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host == "10.0.0.3":  # it dies on the request, and a new one starts
            names["generator"] = ["10.0.0.2", "10.0.0.4"]
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=ServedWeights(version=V1, manifest_digest="abc").model_dump_json())

    client = GeneratorClient(["http://generator:8000"], None, transport=httpx.MockTransport(handler))
    served = await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=5)
    assert served.keys() == {"http://10.0.0.2:8000", "http://10.0.0.4:8000"}
    assert sorted(asked) == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]


async def test_replica_without_an_address_is_named_at_the_deadline(names: Names):
    names["zero"] = ["10.0.0.2"]

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "one":
            raise httpx.ConnectError("Name or service not known")
        return httpx.Response(200, content=ServedWeights(version=V1, manifest_digest="abc").model_dump_json())

    client = GeneratorClient(["http://zero", "http://one"], None, transport=httpx.MockTransport(handler))
    with pytest.raises(TimeoutError, match=r"http://one.*not known"):
        await client.wait_ready(timeout_s=0.1)
    served = await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=5)
    assert len(served) == 1, "once the run has started, the others serve on"
