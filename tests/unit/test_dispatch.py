"""Prompts go to the replica of their session, or to the one with the fewest outstanding tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tandem_protocol.messages import Prompt
from tandem_rollout.dispatch import FIRST_REST_S, LONGEST_REST_S, Dispatch

URLS = ("http://a", "http://b", "http://c")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatch(clock: Clock) -> Dispatch:
    return Dispatch(clock=clock)


@pytest.fixture
def under_way() -> Iterator[ExitStack]:
    """Requests that have not ended."""
    with ExitStack() as stack:
        yield stack


def place(dispatch: Dispatch, session: str | None = None, urls: tuple[str, ...] = URLS, tokens: int = 10) -> str:
    (url,) = dispatch.divide({0: Prompt(token_ids=(1,), session=session)}, tokens, urls)
    return url


def send(dispatch: Dispatch, under_way: ExitStack, session: str | None = None, tokens: int = 10) -> str:
    url = place(dispatch, session, tokens=tokens)
    under_way.enter_context(dispatch.sending(url, 1, tokens))
    return url


def test_the_prompts_of_a_request_are_divided_evenly(dispatch: Dispatch) -> None:
    parts = dispatch.divide({i: Prompt(token_ids=(1,)) for i in range(7)}, 10, URLS)
    assert parts == {"http://a": [0, 3, 6], "http://b": [1, 4], "http://c": [2, 5]}


def test_single_prompts_are_divided_evenly_also_if_each_is_answered_at_once(dispatch: Dispatch) -> None:
    assert Counter(place(dispatch) for _ in range(30)) == dict.fromkeys(URLS, 10)


def test_a_replica_with_many_outstanding_tokens_gets_no_more_until_the_others_have_as_many(
    dispatch: Dispatch, under_way: ExitStack
) -> None:
    assert send(dispatch, under_way, tokens=1000) == "http://a"
    assert "http://a" not in {send(dispatch, under_way, tokens=100) for _ in range(18)}
    assert dispatch.outstanding == {"http://a": 1000, "http://b": 900, "http://c": 900}


def test_tokens_are_outstanding_until_their_group_arrives_or_the_request_ends(dispatch: Dispatch) -> None:
    with dispatch.sending("http://a", 3, 10) as load:
        assert dispatch.outstanding["http://a"] == 30
        load.answered()
        assert dispatch.outstanding["http://a"] == 20
    assert dispatch.outstanding["http://a"] == 0


def test_the_loads_are_the_tokens_since_the_last_call_and_those_outstanding_now(
    dispatch: Dispatch, under_way: ExitStack
) -> None:
    dispatch.sampled.update({"http://a": 70, "http://b": 30})
    with dispatch.sending("http://c", 1, 10):
        under_way.enter_context(dispatch.sending("http://b", 2, 10))
    sampled, outstanding = dispatch.loads()
    assert sampled == {"http://a": 70, "http://b": 30}
    assert outstanding == {"http://a": 0, "http://b": 20}
    assert dispatch.loads() == ({"http://b": 0}, {"http://b": 20})


def test_the_turns_of_a_session_stay_on_one_replica_whatever_its_load(dispatch: Dispatch, under_way: ExitStack) -> None:
    first = {session: send(dispatch, under_way, session) for session in ("x", "y", "z")}
    assert set(first.values()) == set(URLS)
    for _ in range(5):
        assert send(dispatch, under_way, "x", tokens=500) == first["x"]
    assert place(dispatch, "y") == first["y"]


def test_a_session_moves_if_its_replica_fails_and_stays_where_it_went(dispatch: Dispatch, clock: Clock) -> None:
    before = place(dispatch, "x")
    dispatch.failed(before)
    after = place(dispatch, "x")
    assert after != before
    clock.now_s += LONGEST_REST_S
    dispatch.works(before)
    assert {place(dispatch, "x") for _ in range(5)} == {after}


def test_a_session_moves_if_its_replica_has_left(dispatch: Dispatch) -> None:
    before = place(dispatch, "x")
    others = tuple(url for url in URLS if url != before)
    assert place(dispatch, "x", others) in others


def test_a_failed_replica_gets_one_prompt_as_a_trial_after_each_pause(dispatch: Dispatch, clock: Clock) -> None:
    """A dead replica has no outstanding tokens. Without a pause it would attract all prompts."""
    tried_s = []
    for tick in range(400):
        clock.now_s = 100 + tick * FIRST_REST_S / 4
        for _ in range(5):
            if place(dispatch) == "http://a":
                tried_s.append(clock.now_s)
                dispatch.failed("http://a")
    assert 2 <= len(tried_s) <= 10, "the pauses double"


def test_requests_that_fail_at_the_same_time_count_once(dispatch: Dispatch, clock: Clock) -> None:
    for _ in range(500):
        dispatch.failed("http://a")
    clock.now_s += FIRST_REST_S
    assert "http://a" in {place(dispatch) for _ in range(3)}


def test_if_all_replicas_have_failed_prompts_still_go_somewhere(dispatch: Dispatch) -> None:
    for url in URLS:
        dispatch.failed(url)
    assert {place(dispatch) for _ in range(3)} <= set(URLS)


def test_prompts_that_stay_together_go_to_one_replica(dispatch: Dispatch) -> None:
    prompts = {i: Prompt(token_ids=(1,)) for i in (3, 5, 8)}
    assert list(dispatch.divide(prompts, 10, URLS, together=True).values()) == [[3, 5, 8]]
