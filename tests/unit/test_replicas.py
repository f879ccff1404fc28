"""A name with several addresses means several replicas, which may disappear and come back during a wait."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from support.fake_generators import speaking
from support.rollouts import completion
from tandem_protocol.messages import Group, Prompt, RolloutLine, RolloutRequest, Sampling, ServedWeights, SetWeights
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient
from tandem_rollout.replicas import Replicas

V1 = Version(1, 1)
Names = dict[str, list[str]]


async def test_each_address_of_a_name_is_a_replica_and_a_name_with_one_address_is_kept(names: Names):
    names |= {"generator": ["10.0.0.3", "10.0.0.2"], "single": ["10.0.0.9"]}
    urls = ("http://generator:8000", "http://single:8000", "https://generator", "http://gone:8000")
    assert await Replicas(urls).now() == ("http://10.0.0.2:8000", "http://10.0.0.3:8000", *urls[1:])


async def test_a_name_with_addresses_of_version_6_only_is_several_replicas(monkeypatch: pytest.MonkeyPatch):
    def getaddrinfo(host: str, port: int, family: int, *_: object) -> list[tuple[object, ...]]:
        if family == socket.AF_INET:
            raise socket.gaierror(socket.EAI_NONAME, "No address associated with hostname")
        return [(family, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)) for address in ("fd00::3", "fd00::2")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await Replicas(["http://generator:8000"]).now() == ("http://[fd00::2]:8000", "http://[fd00::3]:8000")


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


async def test_callers_that_ask_at_the_same_time_share_a_look_up_and_a_later_one_sees_changes(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names["generator"] = ["10.0.0.2"]
    looked_up = 0
    fake = socket.getaddrinfo

    def counted(*arguments: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        return fake(*arguments)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    replicas = Replicas(["http://generator:8000", "http://10.0.0.9:8000"])
    found = await asyncio.gather(*(replicas.now(max_age_s=60) for _ in range(100)))
    assert set(found) == {("http://generator:8000", "http://10.0.0.9:8000")}
    assert looked_up == 1, "an address is not looked up"
    names["generator"] = ["10.0.0.2", "10.0.0.3"]
    assert len(await replicas.now(max_age_s=60)) == 2
    assert len(await replicas.now()) == 3
    assert len(await replicas.now(max_age_s=60)) == 3


async def test_a_replica_that_moves_is_found_after_the_first_failure(names: Names) -> None:
    names["generator"] = ["10.0.0.2"]
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        if request.url.host == "generator" and names["generator"] != ["10.0.0.2"]:
            raise httpx.ConnectError("refused")
        group = Group(prompt_index=0, completions=(completion([5], version=V1),))
        return httpx.Response(200, text=RolloutLine(group=group).model_dump_json(exclude_none=True))

    client = GeneratorClient(["http://generator:8000"], None, transport=speaking(handler))
    request = RolloutRequest(prompts=(Prompt(token_ids=(5,)),), sampling=Sampling(max_tokens=1))
    for addresses in (["10.0.0.2"], ["10.0.0.4", "10.0.0.5"]):
        names["generator"] = addresses
        await client.rollouts(request, lambda _: None, timeout_s=5)
    assert hosts[:2] == ["generator"] * 2
    assert hosts[2] in ("10.0.0.4", "10.0.0.5")
