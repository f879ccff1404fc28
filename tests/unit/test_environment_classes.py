"""A class in the convention of TRL's `environment_factory` runs as it does there, and whatever breaks has a reason."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from support.environment_classes import CounterEnv, WordEnv, play, play_one, said, started
from support.episodes import Row, called
from tandem_rollout.environments import Done
from tandem_rollout.errors import UserError
from tandem_rollout.tools import Tool
from tandem_rollout.trajectory import Trajectory


async def test_instances_are_used_again_and_never_by_two_episodes_at_once() -> None:
    made: list[WordEnv] = []

    def factory() -> WordEnv:
        made.append(WordEnv())
        return made[-1]

    environments = await started(factory)
    row = Row(columns={"word": "a"})
    for _ in range(3):
        await play(environments, called("guess", guess="a"), "Done.", row=row, size=4)
    assert len(made) == 4
    assert [one.episodes for one in made] == [3, 3, 3, 3]


class GuessingGame:
    """It answers in text."""

    def reset(self, number: int) -> str:
        self.number, self.tries = number, 0
        return "Guess my number."

    async def step(self, message: Mapping[str, Any]) -> str | list[dict[str, Any]] | dict[str, Any] | Done:
        self.tries += 1
        guess = int(message["content"])
        if guess == self.number:
            return Done(reward=1 / self.tries)
        if self.tries == 2:
            return [{"role": "user", "content": "Hm."}, {"role": "user", "content": "No."}]
        return {"role": "user", "content": "Higher."} if guess < self.number else "Lower."


async def test_an_environment_can_answer_in_text_and_end_the_episode() -> None:
    row = Row(None, (), {"number": 7})
    trajectory = await play_one(GuessingGame, "5", "9", "7", row=row)
    assert said(trajectory) == [("user", text) for text in ("Guess my number.", "Higher.", "Hm.", "No.")]
    assert (trajectory.status, trajectory.turns, trajectory.rewards) == ("finished", 3, {"GuessingGame": 1 / 3})
    environments = await started(GuessingGame)
    assert (environments.answers_in_text, environments.schemas) == (True, [])
    endless = await play_one(GuessingGame, "5", row=row, max_turns=3)
    assert (endless.status, endless.rewards) == ("max_turns", {})
    broken = await play_one(GuessingGame, "five", row=row)
    assert (broken.status, broken.reward) == ("failed", None)
    assert str(broken.reason).startswith("environment GuessingGame: step: ValueError: invalid literal for int()")


async def test_a_step_that_is_not_ours_is_a_tool_as_with_trl() -> None:
    class Stepping:
        def reset(self, **columns: Any) -> None:
            pass

        def step(self, action: str) -> str:
            """Take an action.

            Args:
                action: What to do.
            """
            return f"did {action}"

    trajectory = await play_one(Stepping, called("step", action="jump"), "Done.")
    assert said(trajectory)[1] == ("tool", "did jump")


class Inherited(CounterEnv):
    limit = 3
    kind = dict

    @property
    def risky(self) -> int:
        raise RuntimeError("read")

    @staticmethod
    def double(number: int) -> int:
        """Double a number.

        Args:
            number: A number.
        """
        return 2 * number

    async def wait(self) -> str:
        """Wait."""
        await asyncio.sleep(0)
        return "waited"

    def _private(self) -> None:
        pass


async def test_public_methods_of_all_kinds_are_tools_and_nothing_else_is() -> None:
    def shout(text: str) -> str:
        """Shout.

        Args:
            text: What.
        """
        return text.upper()

    environments = await started(Inherited, tools=[Tool.of(shout)])
    names = [schema["function"]["name"] for schema in environments.schemas]
    assert sorted(names) == ["double", "raise_by", "shout", "wait"]
    calls = [called("double", number=4), called("wait"), called("shout", text="a"), called("raise_by", amount=1)]
    group = await play(environments, "".join(calls), "Done.")
    assert [text for role, text in said(group.trajectories[0]) if role == "tool"] == ["8", "waited", "A", "1"]


class NoReset:
    def move(self) -> str:
        """Move."""
        return ""


class Undocumented:
    def reset(self, **columns: Any) -> None:
        pass

    def move(self) -> str:
        return ""


class NeedsArguments:
    def __init__(self, url: str) -> None:
        pass

    def reset(self, **columns: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (NoReset, "environment NoReset has no method reset"),
        (Undocumented, "environment Undocumented: tool move: .*no docstring.*Fix"),
        (NeedsArguments, "environment NeedsArguments: TypeError: .*'url'.*Fix: correct the environment"),
    ],
)
async def test_a_class_that_does_not_follow_the_convention_is_refused_at_the_start(factory: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        await started(factory)


def breaking(method: str, answer: Any) -> type:
    """A class whose method returns `answer`, or raises it."""

    def give(self: Any, *args: Any, **columns: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def step(self: Any, message: Any) -> Any:
        return give(self)

    give.__name__ = method
    given = {"reset": lambda self, **columns: None, method: step if method == "step" else give}
    return type("Broken", (), given)


@pytest.mark.parametrize(
    ("method", "answer", "reason"),
    [
        ("reset", RuntimeError("no server"), "reset: RuntimeError: no server"),
        ("reset", SystemExit(1), "reset: RuntimeError: SystemExit: 1"),
        ("reset", 3, "reset returned 3, expected text"),
        ("reset", [{"type": "image"}], "reset returned .*expected text"),
        ("step", None, "step returned None, expected text, messages with role and content, or Done"),
        ("step", [], "step returned \\[\\], expected text"),
        ("step", [{"content": "x"}], "step returned .*expected text, messages"),
        ("step", {"role": "user", "content": None}, "step returned None, expected text"),
        ("step", Done(float("nan")), "step returned nan, expected a finite number"),
        ("get_reward", ValueError("x"), "get_reward: ValueError: x"),
        ("get_reward", "high", "get_reward returned 'high', expected a finite number"),
        ("get_reward", float("inf"), "get_reward returned inf, expected a finite number"),
    ],
)
async def test_an_environment_that_breaks_fails_its_episode_with_the_reason(
    method: str, answer: Any, reason: str
) -> None:
    trajectory = await play_one(breaking(method, answer), "Hi.")
    assert trajectory.status == "failed"
    assert trajectory.reward is None
    assert re.match(f"environment Broken: {reason}", str(trajectory.reason))


@pytest.mark.parametrize("value", [None, 1, True, 0.25])
async def test_a_reward_is_a_number_or_nothing(value: Any) -> None:
    trajectory = await play_one(breaking("get_reward", value), "Hi.")
    assert trajectory.rewards == {"Broken": None if value is None else float(value)}
    assert trajectory.reward == (None if value is None else float(value))


async def test_an_asynchronous_reward_is_awaited() -> None:
    class Judged:
        async def reset(self, **columns: Any) -> str:
            await asyncio.sleep(0)
            return "?"

        async def get_reward(self) -> float:
            await asyncio.sleep(0)
            return 0.75

    assert (await play_one(Judged, "Hi.", row=Row(None))).reward == 0.75


class Slow:
    """Its synchronous method hangs until the test releases it."""

    release = threading.Event()

    def reset(self, **columns: Any) -> None:
        pass

    def hang(self) -> str:
        """Hang."""
        self.release.wait(30)
        return "late"

    async def hang_soon(self) -> str:
        """Hang."""
        await asyncio.sleep(30)
        return "late"


async def test_a_method_that_hangs_fails_the_episode_only_if_it_cannot_be_stopped() -> None:
    made: list[Slow] = []

    def factory() -> Slow:
        made.append(Slow())
        return made[-1]

    environments = await started(factory, timeout_s=0.1)
    stopped = (await play(environments, called("hang_soon"), "Well.")).trajectories[0]
    assert said(stopped)[1] == ("tool", '{"error": "no answer within 0.1 s"}')
    assert stopped.status == "finished"
    hung = (await play(environments, called("hang") * 3, "Well.")).trajectories[0]
    assert hung.status == "failed"
    assert "environment Slow: hang, hang, hang: no answer within 0.1 s, and a thread cannot be stopped" in str(
        hung.reason
    )
    assert len(made) == 1
    after = (await play(environments, "Well.")).trajectories[0]
    assert after.status == "finished"
    assert len(made) == 2  # the hanging one is not used again
    Slow.release.set()


async def test_all_synchronous_methods_of_an_instance_run_in_one_thread() -> None:
    class Stored:
        def __init__(self) -> None:
            self.database = sqlite3.connect(":memory:")  # checks the thread itself
            self.database.execute("create table t (x)")

        def reset(self, **columns: Any) -> None:
            self.database.execute("delete from t")

        def add(self, x: int) -> int:
            """Add.

            Args:
                x: what
            """
            self.database.execute("insert into t values (?)", (x,))
            return int(self.database.execute("select sum(x) from t").fetchone()[0])

        def get_reward(self) -> float:
            return float(self.database.execute("select count(*) from t").fetchone()[0])

    group = await play(await started(Stored), called("add", x=2), called("add", x=3), "Done.", size=8)
    assert [t.reward for t in group.trajectories] == [2.0] * 8
    assert {said(t)[2] for t in group.trajectories} == {("tool", "5")}


async def test_a_context_manager_is_entered_and_left_once_per_instance() -> None:
    events: list[str] = []

    class Managed:
        def reset(self, **columns: Any) -> None:
            events.append("reset")

        def __enter__(self) -> Managed:
            events.append("enter")
            return self

        def __exit__(self, *_: Any) -> None:
            events.append("exit")

    environments = await started(Managed)
    await play(environments, "Hi.")
    await play(environments, "Hi.")
    await environments.close()
    assert events == ["enter", "reset", "reset", "exit"]


async def test_long_observations_are_cut_and_lone_surrogates_replaced() -> None:
    trajectory = await play_one(breaking("reset", "\ud83d" + "x" * 1000), "Hi.", row=Row(None))
    text = said(trajectory)[0][1]
    assert text.startswith("\ufffdxxx")
    assert text.endswith("… (1001 characters, of which the first 500 are shown)")
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory
