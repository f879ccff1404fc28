"""The client delivers every group exactly once, retries temporary failures, and raises all others at once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from support.fake_generators import speaking
from support.rollouts import completion
from tandem_protocol.errors import BadRequest, ErrorBody, StalePolicy, TandemError, WeightsRefused
from tandem_protocol.messages import Group, Prompt, RolloutLine, RolloutRequest, Sampling, ServedWeights, SetWeights
from tandem_protocol.version import Version
from tandem_rollout.client import GeneratorClient

V1 = Version(1, 1)
REQUEST = RolloutRequest(
    prompts=tuple(Prompt(token_ids=(10 + i,)) for i in range(5)), sampling=Sampling(max_tokens=4), min_version=V1
)
Handler = Callable[[httpx.Request], httpx.Response]


pytestmark = pytest.mark.usefixtures("names")


class Stream(httpx.AsyncByteStream):
    """A response body with these lines. With `broken`, the connection breaks after them."""

    def __init__(self, lines: list[RolloutLine], *, broken: bool = False) -> None:
        self._lines, self._broken = lines, broken

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line.model_dump_json().encode() + b"\n"
        if self._broken:
            raise httpx.ReadError("connection reset")


def _lines(request: httpx.Request, *, version: Version = V1, finish: str = "stop") -> list[RolloutLine]:
    """Return one group per prompt of the request. The completion has the tokens of the prompt."""
    prompts = json.loads(request.content)["prompts"]
    return [
        RolloutLine(
            group=Group(prompt_index=i, completions=(completion(p["token_ids"], version=version, finish=finish),))
        )
        for i, p in enumerate(prompts)
    ]


def _answer(lines: list[RolloutLine], *, broken: bool = False) -> httpx.Response:
    return httpx.Response(200, stream=Stream(lines, broken=broken))


def _error(error: TandemError) -> httpx.Response:
    return httpx.Response(error.status, content=error.body.model_dump_json())


async def _rollouts(*handlers: Handler, timeout_s: float = 5.0) -> dict[int, int]:
    """Request rollouts and return prompt index → token of its completion. Replica i answers with handler i."""
    urls = [f"http://replica{i}" for i in range(len(handlers))]
    transport = speaking(lambda request: handlers[int(request.url.host[-1])](request))
    got: list[Group] = []
    client = GeneratorClient(urls, "secret", transport=transport)
    await client.rollouts(REQUEST, got.append, timeout_s=timeout_s)
    assert len({group.prompt_index for group in got}) == len(got), "a group came twice"
    return {group.prompt_index: group.completions[0].token_ids[0] for group in got}


ALL = {i: 10 + i for i in range(5)}


async def test_prompts_are_divided_among_replicas_and_keep_their_index():
    requested: list[list[int]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret"
        requested.append([p["token_ids"][0] for p in json.loads(request.content)["prompts"]])
        return _answer(_lines(request)[::-1])

    assert await _rollouts(handler, handler) == ALL
    assert sorted(requested) == [[10, 12, 14], [11, 13]]


async def test_the_tokens_of_each_replica_are_counted_once_per_group():
    client = GeneratorClient(["http://replica0"], "secret", transport=speaking(lambda r: _answer(_lines(r) * 2)))
    await client.rollouts(REQUEST, lambda _: None, timeout_s=5.0)
    assert client.dispatch.loads().sampled == {"http://replica0": 5}
    assert client.dispatch.loads().sampled == {}
    await client.close()


async def test_short_requests_of_several_ranks_use_all_replicas():
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return _answer(_lines(request))

    short = REQUEST.model_copy(update={"prompts": REQUEST.prompts[:1]})
    for rank in range(2):
        client = GeneratorClient(["http://replica0", "http://replica1"], None, rank=rank, transport=speaking(handler))
        for _ in range(2):
            await client.rollouts(short, lambda _: None, timeout_s=5)
    assert hosts == ["replica0", "replica1", "replica1", "replica0"]


async def test_after_a_broken_stream_only_the_missing_prompts_are_requested_again():
    requested: list[list[int]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requested.append([p["token_ids"][0] for p in json.loads(request.content)["prompts"]])
        first = len(requested) == 1
        return _answer(_lines(request)[1:3] if first else _lines(request), broken=first)

    assert await _rollouts(handler) == ALL
    assert requested == [[10, 11, 12, 13, 14], [10, 13, 14]]


@pytest.mark.parametrize(
    "trouble",
    [
        lambda request: _answer(_lines(request)[:2]),
        lambda request: _answer(_lines(request, version=Version(0, 1))),
        lambda request: _answer(_lines(request, version=Version(9, 0))),
        lambda request: _answer(_lines(request, finish="abort")),
        lambda request: _answer([*_lines(request)[:1], RolloutLine(error=StalePolicy("old").body)]),
        lambda request: _error(StalePolicy("old")),
        lambda request: httpx.Response(502, text="<html>bad gateway</html>"),
        lambda request: httpx.Response(200, text="not json\n"),
    ],
    ids=["short stream", "stale step", "stale attempt", "aborted", "error line", "refused", "proxy", "garbage"],
)
async def test_temporary_failures_are_retried(trouble: Handler):
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return trouble(request) if calls == 1 else _answer(_lines(request))

    assert await _rollouts(handler) == ALL
    assert calls == 2


async def test_the_prompts_of_a_dead_replica_go_to_another():
    def dead(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert await _rollouts(lambda request: _answer(_lines(request)), dead) == ALL


async def test_a_refusal_is_raised_at_once_and_names_the_replica():
    with pytest.raises(BadRequest, match="http://replica0: prompt too long"):
        await _rollouts(lambda _: _error(BadRequest("prompt too long")))


async def test_the_timeout_error_contains_the_last_errors():
    with pytest.raises(TimeoutError, match=r"5 of 5 groups are missing.*StalePolicy: serves 0\.1"):
        await _rollouts(lambda _: _error(StalePolicy("serves 0.1")), timeout_s=0.1)


async def test_weights_are_set_on_all_replicas_with_retries():
    calls: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(f"{request.url.host} {request.method} {request.url.path}")
        if calls.count(calls[-1]) == 1 and request.url.host == "replica1":
            raise httpx.ConnectError("refused")
        assert SetWeights.model_validate_json(request.content).manifest_digest == "abc"
        return httpx.Response(200, content=ServedWeights(version=V1, manifest_digest="abc").model_dump_json())

    client = GeneratorClient(["http://replica0", "http://replica1"], None, transport=httpx.MockTransport(handler))
    served = await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=5)
    assert {url: weights.version for url, weights in served.items()} == dict.fromkeys(
        ["http://replica0", "http://replica1"], V1
    )
    assert sorted(calls) == ["replica0 PUT /weights/1.1", *["replica1 PUT /weights/1.1"] * 2]


async def test_weights_are_not_waited_for_on_a_replica_that_cannot_be_reached(caplog: pytest.LogCaptureFixture):
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "replica1":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, content=ServedWeights(version=V1, manifest_digest="abc").model_dump_json())

    client = GeneratorClient(["http://replica0", "http://replica1"], None, transport=httpx.MockTransport(handler))
    served = await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=5)
    assert list(served) == ["http://replica0"]
    assert "waiting for generator http://replica1: ConnectError: refused" in caplog.messages


async def test_weights_are_waited_for_if_no_replica_can_be_reached():
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = GeneratorClient(["http://replica0", "http://replica1"], None, transport=httpx.MockTransport(handler))
    with pytest.raises(TimeoutError, match=r"serve version 1\.1.*replica0.*refused.*replica1.*refused"):
        await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=1)


async def test_refused_weights_are_raised_at_once():
    transport = httpx.MockTransport(lambda _: _error(WeightsRefused("flipped byte")))
    client = GeneratorClient(["http://replica0"], None, transport=transport)
    with pytest.raises(WeightsRefused, match="replica0: flipped byte"):
        await client.set_weights(V1, SetWeights(manifest_digest="abc"), timeout_s=5)


async def test_wait_ready_waits_and_its_timeout_error_contains_the_reason():
    answers = iter([httpx.Response(503, json={"ready": False, "reason": "loading"}), httpx.Response(200)])
    client = GeneratorClient(["http://replica0"], None, transport=httpx.MockTransport(lambda _: next(answers)))
    await client.wait_ready(timeout_s=5)
    never = httpx.MockTransport(lambda _: httpx.Response(503, json={"ready": False, "reason": "loading"}))
    with pytest.raises(TimeoutError, match=r"replica0.*loading"):
        await GeneratorClient(["http://replica0"], None, transport=never).wait_ready(timeout_s=0.05)


async def test_a_server_that_is_not_a_generator_is_recognized():
    transport = httpx.MockTransport(lambda _: httpx.Response(404, text="nothing here"))
    with pytest.raises(TandemError, match="Is this a server of Tandem"):
        await GeneratorClient(["http://replica0"], None, transport=transport).info(timeout_s=1)


async def test_cancelling_rollouts_cancels_the_requests():
    started = asyncio.Event()

    async def hang(request: httpx.Request) -> httpx.Response:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    client = GeneratorClient(["http://replica0"], None, transport=speaking(hang))
    task = asyncio.create_task(client.rollouts(REQUEST, print, timeout_s=60))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_error_bodies_follow_the_contract():
    assert ErrorBody.model_validate_json(_error(StalePolicy("x")).content).retryable


async def test_the_kernel_notices_a_generator_whose_host_is_gone() -> None:
    """A host without power closes no connection, and a generator that samples sends nothing for minutes."""
    options: list[tuple[int, int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        options.extend(_options_of_the_client(writer.get_extra_info("peername")[1]))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = GeneratorClient([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], None)
    with pytest.raises(TimeoutError):
        await client.wait_ready(2)
    await client.close()
    server.close()
    assert set(options) == {(1, 30_000)}


def _options_of_the_client(port: int) -> Iterator[tuple[int, int]]:
    """SO_KEEPALIVE and TCP_USER_TIMEOUT of this process's connections that come from `port`."""
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_socket():
            with socket.socket(fileno=os.dup(int(descriptor.name))) as found:
                if found.family == socket.AF_INET and found.getsockname()[1] == port:
                    yield (
                        found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                        found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                    )
