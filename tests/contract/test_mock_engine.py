"""Properties of the mock that a trainer's tests rely on: exact logprobs, repeatable samples, configurable faults."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from support.generators import Generator, running
from support.weights import publish, shard
from tandem_generator.engines.mock import ConnectionDropped, MockEngine, MockPolicy
from tandem_protocol.config.generator import FaultsConfig, MockConfig
from tandem_protocol.errors import EngineFailed
from tandem_protocol.messages import (
    Completion,
    Group,
    Prompt,
    RolloutLine,
    RolloutRequest,
    Sampling,
    SwitchMode,
    VersionSpan,
)
from tandem_protocol.store import WeightStore
from tandem_protocol.version import BASE, Version

V1, V2 = Version(1, 1), Version(2, 1)
VOCAB, EOS = 256, 0
SLOW = FaultsConfig(token_latency_s=0.001)


def engine(faults: FaultsConfig | None = None, **config: Any) -> MockEngine:
    return MockEngine("no-such-model", MockConfig(faults=faults or FaultsConfig(), **config), max_model_len=None)


def ask(
    engine: MockEngine, *seeds: int, tokens: tuple[int, ...] = (5, 9), **sampling: Any
) -> AsyncGenerator[Group, None]:
    """Request rollouts with one prompt per seed."""
    return engine.generate(
        RolloutRequest(
            prompts=tuple(Prompt(token_ids=tokens, seed=seed) for seed in seeds),
            sampling=Sampling(**({"max_tokens": 50} | sampling)),
        )
    )


async def sample(engine: MockEngine, *seeds: int, **sampling: Any) -> list[Completion]:
    """Return the completions of all prompts, in the order of the prompts."""
    groups = [group async for group in ask(engine, *(seeds or (0,)), **sampling)]
    return [c for group in sorted(groups, key=lambda group: group.prompt_index) for c in group.completions]


# -- the policy ------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_same_in_every_process() -> None:
    program = (
        "import asyncio\n"
        "from contract.test_mock_engine import engine, sample\n"
        "print([c.model_dump_json() for c in asyncio.run(sample(engine(), 7, n=3))])"
    )
    tests = Path(__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", program], cwd=tests, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([c.model_dump_json() for c in asyncio.run(sample(engine(), 7, n=3))])


async def test_completion_i_uses_seed_plus_i_and_unseeded_ones_differ() -> None:
    assert await sample(engine(), 7, n=3) == await sample(engine(), 7, 8, 9)
    unseeded = RolloutRequest(
        prompts=(Prompt(token_ids=(5,)),), sampling=Sampling(max_tokens=50, n=20, ignore_eos=True)
    )
    (group,) = [group async for group in engine().generate(unseeded)]
    assert len({completion.token_ids for completion in group.completions}) == 20


async def test_tokens_depend_on_step_seed_and_prompt_but_not_on_the_attempt() -> None:
    mock = engine()
    first = await sample(mock, 7, ignore_eos=True)
    tokens = {c.token_ids for c in (*first, *await sample(mock, 8, ignore_eos=True))}
    tokens |= {c.token_ids for c in await sample(mock, 7, tokens=(5, 8), ignore_eos=True)}
    await mock.load_weights(V1, ())
    (of_v1,) = await sample(mock, 7, ignore_eos=True)
    assert len(tokens | {of_v1.token_ids}) == 4
    await mock.load_weights(Version(1, 2), ())
    (again,) = await sample(mock, 7, ignore_eos=True)
    assert again.token_ids == of_v1.token_ids
    assert again.versions == (VersionSpan(version=Version(1, 2), tokens=50),)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
async def test_logprobs_match_the_sampled_distribution(
    filters: dict[str, float],
) -> None:
    mock = engine()
    await mock.load_weights(V1, ())
    policy = MockPolicy(VOCAB, EOS)
    sampling = Sampling(max_tokens=50, **filters)
    for completion in await sample(mock, 1, 2, 3, n=4, **filters):
        context = [5, 9]
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            candidates, probabilities = policy.distribution(policy.context(context), V1, sampling)
            assert math.exp(logprob) == pytest.approx(probabilities[candidates.index(token)], abs=1e-12)
            context.append(token)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [128, 64, 32, 16, 8, 4, 2, 1]),
        ({"temperature": 0.5}, [4**7, 4**6, 4**5, 4**4, 4**3, 16, 4, 1]),
        ({"top_k": 3}, [4, 2, 1]),
        ({"top_p": 0.75}, [2, 1]),
        ({"min_p": 0.25}, [4, 2, 1]),
        ({"temperature": 0.0}, [1]),
    ],
    ids=str,
)
def test_temperature_and_filters_have_vllms_meaning(filters: dict[str, Any], expected: list[int]) -> None:
    policy = MockPolicy(VOCAB, EOS)
    tokens, got = policy.distribution(policy.context([5]), V1, Sampling(max_tokens=1, **filters))
    padded = [*expected, *[0] * (8 - len(expected))]
    assert got == pytest.approx([weight / sum(expected) for weight in padded])
    assert len(set(tokens)) == 8
    assert EOS in tokens


async def test_token_frequencies_match_their_probabilities() -> None:
    policy = MockPolicy(VOCAB, EOS)
    draws = 4000
    tokens, probabilities = policy.distribution(policy.context([5, 9]), BASE, Sampling(max_tokens=1))
    drawn = Counter(c.token_ids[0] for c in await sample(engine(), 0, n=draws, max_tokens=1))
    for token, probability in zip(tokens, probabilities, strict=True):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(drawn[token] - draws * probability) < 5 * deviation


async def test_greedy_sampling_takes_the_most_likely_token() -> None:
    (greedy,) = await sample(engine(), temperature=0.0, max_tokens=1)
    policy = MockPolicy(VOCAB, EOS)
    assert greedy.token_ids[0] == policy.distribution(policy.context([5, 9]), BASE, Sampling(max_tokens=1))[0][0]


# -- switches --------------------------------------------------------------------------------------------------------


async def while_running(mock: MockEngine, mode: SwitchMode) -> list[Completion]:
    """Switch to V2 in the middle of a request with two prompts, and return its completions."""
    await mock.load_weights(V1, ())
    asked = asyncio.create_task(sample(mock, 1, 2, n=2, max_tokens=60, ignore_eos=True))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        await mock.pause(mode)
    await mock.load_weights(V2, ())
    late = asyncio.create_task(sample(mock, 3))
    await mock.resume()
    assert [span.version for c in await late for span in c.versions] == [V2]
    return await asked


async def test_drain_lets_a_running_request_finish_on_the_old_version() -> None:
    completions = await while_running(engine(SLOW), SwitchMode.DRAIN)
    assert [c.versions for c in completions] == [(VersionSpan(version=V1, tokens=60),)] * 4


async def test_spans_show_where_a_switch_in_flight_happened() -> None:
    first, *_ = completions = await while_running(engine(SLOW), SwitchMode.IN_FLIGHT)
    assert [c.finish_reason for c in completions] == ["length"] * 4
    assert [[span.version for span in c.versions] for c in completions] == [[V1, V2]] * 4
    policy = MockPolicy(VOCAB, EOS)
    sampling = Sampling(max_tokens=60, ignore_eos=True)
    context = [5, 9]
    versions = [span.version for span in first.versions for _ in range(span.tokens)]
    for token, logprob, version in zip(first.token_ids, first.logprobs, versions, strict=True):
        candidates, probabilities = policy.distribution(policy.context(context), version, sampling)
        assert math.exp(logprob) == pytest.approx(probabilities[candidates.index(token)])
        context.append(token)


async def test_abort_ends_a_running_request_with_partial_completions() -> None:
    completions = await while_running(engine(SLOW), SwitchMode.ABORT)
    assert [c.finish_reason for c in completions] == ["abort"] * 4
    assert 0 < len(completions[0].token_ids) < 60
    assert {span.version for c in completions for span in c.versions} == {V1}


async def test_abort_skips_the_latency_of_the_remaining_groups() -> None:
    mock = engine(FaultsConfig(latency_s=0.1))
    asked = asyncio.create_task(sample(mock, *range(100)))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await mock.pause(SwitchMode.ABORT)
    await mock.resume()
    assert [c.finish_reason for c in await asked] == ["abort"] * 100


async def test_the_groups_of_a_request_decode_at_the_same_time_and_come_when_they_have_finished() -> None:
    lengths = [len(c.token_ids) for c in await sample(engine(), *range(0, 800, 100))]
    assert len({*lengths}) > 4
    groups = [group async for group in ask(engine(FaultsConfig(token_latency_s=0.005)), *range(0, 800, 100))]
    arrived = [lengths[group.prompt_index] for group in groups]
    assert arrived == sorted(lengths)


async def test_without_a_latency_a_group_comes_before_the_other_groups_of_its_request_are_sampled() -> None:
    counted: list[int] = []
    request = RolloutRequest(
        prompts=tuple(Prompt(token_ids=(5,), seed=seed) for seed in range(100)),
        sampling=Sampling(max_tokens=10, ignore_eos=True),
    )
    sampled = [len(counted) async for _ in engine().generate(request, counted.append)]
    assert all(tokens <= 10 * (group + 5) for group, tokens in enumerate(sampled))


async def test_a_request_whose_client_has_gone_does_not_delay_a_switch() -> None:
    mock = engine(SLOW)
    async with anyio.create_task_group() as tasks:  # as starlette cancels: at every await
        tasks.start_soon(sample, mock, 1, 2)
        await asyncio.sleep(0.01)
        tasks.cancel_scope.cancel()
    async with asyncio.timeout(60):
        await mock.pause(SwitchMode.DRAIN)


# -- faults ----------------------------------------------------------------------------------------------------------


async def test_latency_is_added_before_each_group() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await sample(engine(FaultsConfig(latency_s=0.05)), 1, 2, 3)
    assert loop.time() - began >= 0.15


async def failures(faults: FaultsConfig, requests: int = 400) -> Counter[str]:
    """Count how requests with one prompt ended: answered, or with the name of the error."""
    mock = engine(faults)
    ends = Counter[str]()
    for _ in range(requests):
        try:
            await sample(mock)
            ends["answered"] += 1
        except (EngineFailed, ConnectionDropped) as error:
            ends[type(error).__name__] += 1
    return ends


async def test_error_rate_is_the_share_of_requests_that_fail() -> None:
    assert await failures(FaultsConfig(error_rate=1.0), 5) == {"EngineFailed": 5}
    assert 60 < (await failures(FaultsConfig(error_rate=0.25)))["EngineFailed"] < 140


async def test_drop_rate_is_the_share_of_requests_that_are_dropped() -> None:
    assert await failures(FaultsConfig(drop_rate=1.0), 5) == {"ConnectionDropped": 5}
    assert 60 < (await failures(FaultsConfig(drop_rate=0.25)))["ConnectionDropped"] < 140


async def test_a_failing_request_yields_half_of_its_groups_first() -> None:
    groups = ask(engine(FaultsConfig(error_rate=1.0)), 1, 2, 3, 4)
    assert [(await anext(groups)).prompt_index, (await anext(groups)).prompt_index] == [0, 1]
    with pytest.raises(EngineFailed):
        await anext(groups)


async def test_a_stale_mock_labels_tokens_with_the_first_version() -> None:
    mock = engine(FaultsConfig(stale=True))
    await mock.load_weights(V1, ())
    await mock.load_weights(V2, ())
    (completion,) = await sample(mock)
    assert [span.version for span in completion.versions] == [V1]


async def test_load_failures_is_the_number_of_loads_that_fail() -> None:
    mock = engine(FaultsConfig(load_failures=2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"because of generator\.mock\.faults\.load_failures"):
            await mock.load_weights(V1, ())
    await mock.load_weights(V1, ())
    assert [span.version for c in await sample(mock) for span in c.versions] == [V1]


async def test_a_load_reads_the_headers_of_its_shards(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    publish(store, V1)
    shard(store, V1).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        await engine().load_weights(V1, [shard(store, V1)])


def test_over_http_a_fault_is_an_error_line_or_a_broken_connection(tmp_path: Path) -> None:
    body = {"prompts": [{"token_ids": [5]}] * 2, "sampling": {"max_tokens": 5}}

    def faulty(knob: str) -> Any:
        return running(
            "mock", "m", tmp_path / "w", f"--generator.mock.faults.{knob}", "1.0", log=tmp_path / f"{knob}.log"
        )

    generator: Generator
    with faulty("error_rate") as generator:
        first, last = [
            RolloutLine.model_validate_json(line) for line in generator.client.post("/rollouts", json=body).iter_lines()
        ]
        assert first.group is not None
        assert last.error is not None
        assert (last.error.code, last.error.retryable) == ("engine_failed", True)
    with faulty("drop_rate") as generator, generator.client.stream("POST", "/rollouts", json=body) as response:
        lines = response.iter_lines()
        assert RolloutLine.model_validate_json(next(lines)).group is not None
        with pytest.raises(httpx.RemoteProtocolError):
            next(lines)
