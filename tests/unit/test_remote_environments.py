"""Environments on servers: episodes are the same as in the trainer's process, and survive what servers do."""

from __future__ import annotations

import asyncio
import datetime
import math
import threading
from typing import Any

import httpx
import pytest

from support.environment_classes import CodeEnv, CounterEnv, GridEnv, WordEnv, play, player, started
from support.environment_servers import Network, Replica, connected, remote
from support.episodes import Policy, Row, called
from support.play import add, loops
from tandem_rollout.environments import Done, EnvironmentFailed, EnvironmentLost, servers, wire
from tandem_rollout.errors import UserError
from tandem_rollout.tools import ToolCall
from tandem_rollout.trajectory import Group, Trajectory
from tandem_rollout.turns import Turn


class TalkEnv:
    """Answers in text."""

    async def reset(self, secret: int) -> str:
        self.secret = secret
        return "Guess a number."

    async def step(self, message: dict[str, Any]) -> Any:
        said = int(message["content"])
        if said == self.secret:
            return Done(reward=1.0)
        return "higher" if said < self.secret else [{"role": "user", "content": "lower"}]


class BrokenEnv:
    def reset(self, **columns: Any) -> None:
        raise RuntimeError("no database")


class SlowEnv:
    """A tool that hangs until the test ends it."""

    entered = threading.Event()
    ended = threading.Event()

    def reset(self, **columns: Any) -> None:
        pass

    def wait(self) -> str:
        """Wait."""
        self.entered.set()
        self.ended.wait(20)
        return "done"

    def get_reward(self) -> float:
        return 1.0


EPISODES: list[tuple[Any, list[str], Row]] = [
    (CounterEnv, [called("raise_by", amount=3), called("raise_by", amount="x"), "Done."], Row(prompt=None)),
    (WordEnv, [called("guess", guess="crane"), called("guess", guess="late")], Row("Guess.", (), {"word": "crane"})),
    ({"code": CodeEnv, "grid": GridEnv}, [called("move", way="up"), "x"], Row("Go.", (), {"environment": "grid"})),
    (TalkEnv, ["1", "9", "5"], Row("Play.", (), {"secret": 5})),
    (TalkEnv, ["I do not know"], Row("Play.", (), {"secret": 5})),
    (CodeEnv, ["<tool_call>{", "x"], Row([{"role": "user", "content": "Run."}], (), {"level": [1, {"a": None}]})),
    (BrokenEnv, ["x"], Row("Play.")),
]


def without_times(group: Group) -> list[Any]:
    return [one.model_dump(exclude={"timings", "reason"}) for one in group.trajectories]


def one(group: Group) -> Trajectory:
    (trajectory,) = group.trajectories
    return trajectory


@pytest.mark.parametrize(("factory", "texts", "row"), EPISODES, ids=lambda value: getattr(value, "__name__", ""))
async def test_an_episode_on_a_server_is_the_same_as_in_this_process(factory: Any, texts: list[str], row: Row) -> None:
    local = await started(factory)
    environments, _ = await connected(replica := Replica(await started(factory)))
    assert (environments.schemas, environments.answers_in_text) == (tuple(local.schemas), local.answers_in_text)
    expected, got = await play(local, *texts, row=row), await play(environments, *texts, row=row)
    assert without_times(got) == without_times(expected)
    assert (one(expected).reason or "") in (one(got).reason or ""), "with the replica's URL before it"
    assert len(replica.sessions) == 0


async def test_tools_without_an_environment_run_on_a_server() -> None:
    environments, _ = await connected(Replica(loops(add)))
    trajectory = one(await play(environments, called("add", a=2, b=3), "5"))
    assert [m["content"] for m in trajectory.messages] == ["Hi.", "", "5", "5"]
    assert (trajectory.tool_calls, trajectory.status) == (1, "finished")


async def test_columns_arrive_as_they_are() -> None:
    columns = {"a": [1, 2.5, None, True], "b": {"ü": math.inf}, "day": datetime.date(2026, 11, 26)}
    seen: list[Any] = []

    class SeeEnv:
        def reset(self, **given: Any) -> None:
            seen.append(given)

    environments, _ = await connected(Replica(await started(SeeEnv)))
    environments.check_rows([row := Row("Hi.", (), columns)])
    await play(environments, "x", row=row)
    assert seen == [{"prompt": "Hi.", **columns, "day": "2026-11-26"}]


async def test_a_row_that_is_not_json_is_refused_at_the_start() -> None:
    environments, _ = await connected(Replica(loops(add)))
    with pytest.raises(UserError, match=r"row 1: column 'thing' of type object cannot be sent"):
        environments.check_rows([Row(), Row("Hi.", (), {"thing": object()})])


async def test_new_sessions_go_to_the_replica_with_the_fewest_and_stay_there() -> None:
    first, second = Replica(await started(WordEnv)), Replica(await started(WordEnv))
    environments, _ = await connected(first, second)
    row = Row("Guess.", (), {"word": "crane"})
    opened = [environments.make() for _ in range(6)]
    for environment in opened:
        await environment.reset(row)
    assert (len(first.sessions), len(second.sessions)) == (3, 3)
    for environment in opened[::2]:
        await environment.close(failed=False)
    assert sorted((len(first.sessions), len(second.sessions))) == [0, 3]
    for _ in range(3):
        await environments.make().reset(row)
    assert (len(first.sessions), len(second.sessions)) == (3, 3)


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_replica_that_dies_in_an_episode_fails_it_and_the_next_try_takes_another(attempts: int) -> None:
    first, second = Replica(await started(TalkEnv)), Replica(await started(TalkEnv))
    environments, network = await connected(first, second)
    row = Row("Play.", (), {"secret": 5})
    turns: list[int] = []

    class Killer(Policy):
        async def __call__(self, *args: Any, **kwargs: Any) -> Any:
            turns.append(kwargs["turn"])
            if not network.dead:
                network.dead.add("127.0.0.1" if len(first.sessions) else "127.0.0.2")
            return await super().__call__(*args, **kwargs)

    group = await player(environments).play_group(environments, row, 0, [Killer("1", "5")], attempts=attempts)
    if attempts == 2:
        assert (one(group).status, one(group).reward) == ("finished", 1.0)
        assert turns == [0, 0, 1]  # a turn's number gives its seed: the policy has said the same
        return
    assert one(group).status == "failed"
    dead = next(iter(network.dead))
    assert one(group).reason == f"http://{dead}:8100 cannot be reached: ConnectError: connection refused"
    again = one(await play(environments, "1", "5", row=row))
    assert (again.status, again.reward) == ("finished", 1.0)


async def test_a_server_that_has_restarted_does_not_know_the_session() -> None:
    replica = Replica(await started(TalkEnv))
    environments, _ = await connected(replica)
    environment = environments.make()
    await environment.reset(Row("Play.", (), {"secret": 5}))
    await replica.sessions.close_of()
    with pytest.raises(EnvironmentLost, match=r"which this server does not have.*restarted"):
        await environment.step(Turn({"role": "assistant", "content": "1"}))
    await environment.close(failed=True)


async def test_if_no_replica_can_be_reached_the_episode_fails_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "UNREACHABLE_S", 0.3)
    environments, network = await connected(Replica(loops(add)))
    network.dead.add("127.0.0.1")
    trajectory = one(await play(environments, "x"))
    assert (trajectory.status, trajectory.turns) == ("failed", 0)
    assert "cannot be reached" in str(trajectory.reason)


async def test_an_answer_that_is_lost_is_asked_for_again_and_nothing_is_done_twice() -> None:
    environments, network = await connected(Replica(await started(CounterEnv)))
    environment = environments.make()
    for act in (environment.reset(Row(prompt=None)), environment.step(raising(1)), environment.step(raising(1))):
        network.breaks = 1
        answer = await act
    assert answer.messages[0]["content"] == "2"
    assert len(network.requests) == 2 + 6


def raising(amount: int) -> Turn:
    function = {"name": "raise_by", "arguments": {"amount": amount}}
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
    return Turn(message, (ToolCall("raise_by", {"amount": amount}),))


async def test_a_full_replica_is_passed_over_and_if_all_are_full_an_episode_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(servers, "FULL_PAUSE_S", 0.05)
    small, large = Replica(loops(add), max_sessions=1), Replica(loops(add), max_sessions=4)
    environments, _ = await connected(small, large)
    opened = [environments.make() for _ in range(5)]
    for environment in opened:
        await environment.reset(Row())
    waiting = asyncio.create_task(environments.make().reset(Row()))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await opened[0].close(failed=False)
    assert (await waiting).messages
    late = remote(Network(small, large), open_timeout_s=0.1)
    with pytest.raises(EnvironmentFailed, match=r"no environment server had room within 0.1 s.*expected fewer"):
        await late.make().reset(Row())


async def test_a_client_that_starts_again_closes_what_it_left_behind_and_nothing_else() -> None:
    replica = Replica(loops(add))
    for owner in ("rank-0", "rank-1"):
        left, _ = await connected(replica, owner=owner)
        await left.make().reset(Row())
    assert len(replica.sessions) == 2
    await connected(replica, owner="rank-0")
    assert len(replica.sessions) == 1


async def test_an_episode_that_is_cancelled_leaves_no_session_behind() -> None:
    environments, _ = await connected(replica := Replica(await started(SlowEnv)))
    playing = asyncio.create_task(play(environments, called("wait")))
    assert await asyncio.to_thread(SlowEnv.entered.wait, 10)
    playing.cancel()
    await asyncio.wait({playing})
    assert playing.cancelled()
    assert len(replica.sessions) == 0
    SlowEnv.ended.set()


async def test_a_wrong_token_or_another_project_is_an_error_at_the_start() -> None:
    with pytest.raises(UserError, match="refuses the token: got another token"):
        await remote(Network(Replica(loops(add))), token="wrong").start()
    with pytest.raises(UserError, match=r"has the tools \['raise_by'\], expected those of .* which are \['add'\]"):
        await connected(Replica(loops(add)), Replica(await started(CounterEnv)))
    network = Network(Replica(loops(add)))
    network.dead.add("127.0.0.1")
    with pytest.raises(UserError, match=r"does not answer: ConnectError.*Fix: start it"):
        await remote(network, start_timeout_s=0.3).start()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"messages": [], "done": False}, "without messages"),
        ({"messages": [{"role": "tool", "content": None}]}, "content is text"),
        ({"messages": [{"content": "x"}]}, "role and content"),
        ({"mesages": []}, "mesages"),
        ({"messages": [{"role": "tool", "content": "x" * 17_000_000}]}, "more than 16777216 bytes"),
        ("not JSON", "cannot read"),
        (httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"{}")), "decompressed"),
    ],
)
async def test_whatever_a_server_in_another_language_answers_is_a_failed_episode(answer: Any, problem: str) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            return httpx.Response(204)
        if request.url.path.endswith("/environment"):
            return httpx.Response(200, json={"protocol": 1, "schemas": [], "answers_in_text": True, "max_sessions": 1})
        if "/steps/" in request.url.path:
            if isinstance(answer, httpx.Response):
                return answer
            return httpx.Response(200, json=answer) if isinstance(answer, dict) else httpx.Response(200, text=answer)
        return httpx.Response(200, json={"messages": [{"role": "user", "content": "Hi."}]})

    network = Network(Replica(loops(add)))
    network.handle_async_request = handle  # type: ignore[method-assign]
    environments = remote(network)
    await environments.start()
    trajectory = one(await play(environments, "x"))
    assert trajectory.status == "failed"
    assert problem in str(trajectory.reason)


async def test_a_server_that_does_not_answer_fails_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MARGIN_S", 0.05)
    replica = Replica(await started(SlowEnv))
    environments, _ = await connected(replica, timeout_s=0.1)
    SlowEnv.ended.clear()
    trajectory = one(await play(environments, called("wait")))
    assert trajectory.status == "failed"
    assert "no answer within 0.2 s" in str(trajectory.reason)
    SlowEnv.ended.set()
