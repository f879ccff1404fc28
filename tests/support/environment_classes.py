"""Play episodes with environment classes."""

from __future__ import annotations

import random
from typing import Any, Literal

from support.episodes import Policy, Row, bpe_tokenizer, renderer
from tandem_rollout.environments import ClassEnvironments, Environments
from tandem_rollout.episode import Limits, Player
from tandem_rollout.trajectory import Group, Trajectory
from tandem_rollout.turns import TurnReader


async def started(factories: Any, **options: Any) -> ClassEnvironments:
    environments = ClassEnvironments(factories, **({"timeout_s": 5.0, "max_characters": 500} | options))
    await environments.start()
    return environments


def player(environments: Environments, **limits: Any) -> Player:
    given = {"max_tokens": 3000, "max_turns": 10} | limits
    one = renderer("Qwen 3")
    return Player(one, TurnReader(bpe_tokenizer(), one, schemas=environments.schemas), Limits(**given))


async def play(
    environments: Environments,
    *texts: str,
    row: Row | None = None,
    size: int = 1,
    score: Any = None,
    **limits: Any,
) -> Group:
    policies = [Policy(*texts, seed=seed) for seed in range(size)]
    one = player(environments, **limits)
    return await one.play_group(environments, row or Row(), 0, policies, score, attempts=1)


async def play_one(factory: Any, *texts: str, row: Row | None = None, options: Any = None, **limits: Any) -> Trajectory:
    environments = await started(factory, **(options or {}))
    group = await play(environments, *texts, row=row, **limits)
    await environments.close()
    return group.trajectories[0]


def said(trajectory: Trajectory) -> list[Any]:
    return [(message["role"], message["content"]) for message in trajectory.messages if message["role"] != "assistant"]


class CounterEnv:
    """After the first example of TRL's GRPO documentation: it finds its own task, and rewards itself."""

    def reset(self, **kwargs) -> str | None:  # type: ignore[no-untyped-def]
        self.value = 0
        self.goal = random.Random(3).randint(1, 6)
        return f"Raise the counter to {self.goal}."

    def get_reward(self) -> float:
        return float(self.value == self.goal)

    def raise_by(self, amount: int) -> int:
        """
        Raise the counter.

        Args:
            amount: What to add to the counter.

        Returns:
            The new value of the counter.
        """
        self.value += amount
        return self.value


class WordEnv:
    """After the Wordle example of TRL's OpenEnv guide: the tool raises when the game is over, a function rewards."""

    def __init__(self) -> None:
        self.episodes = 0

    def reset(self, **kwargs) -> str | None:  # type: ignore[no-untyped-def]
        self.word = kwargs["word"]
        self.left = 3
        self.reward = 0.0
        self.done = False
        self.episodes += 1
        return f" It has {len(self.word)} letters."

    def guess(self, guess: str) -> str:
        """
        Make a guess.

        Args:
            guess: The guessed word.

        Returns:
            Which letters are right.
        """
        if self.done:
            raise ValueError("Game over.")
        self.left -= 1
        self.reward = float(guess == self.word)
        self.done = guess == self.word or not self.left
        return "".join(mine if mine == right else "_" for mine, right in zip(guess, self.word, strict=False))


class CodeEnv:
    def reset(self, **kwargs: Any) -> str:
        self.seen = kwargs
        return "Compute it."

    def run_code(self, code: str) -> str:
        """Run code.

        Args:
            code: What to run.
        """
        return f"ran {code}"


class GridEnv:
    def reset(self, size: int = 3) -> None:
        self.size = size

    def move(self, way: Literal["up", "down"]) -> str:
        """Move.

        Args:
            way: Where to.
        """
        return f"{way} of {self.size}"

    def get_reward(self) -> float:
        return 0.5
