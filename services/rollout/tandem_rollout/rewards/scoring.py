"""Score the trajectories of a row with the reward functions of the user's project."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tandem_protocol.config.rollout import RewardConfig

from ..calls import Caller, ProjectFunction, in_process
from ..errors import UserError
from ..functions import check_rewards, is_sandboxed, load_function
from ..prompts import REWARD_ARGUMENTS, PromptRow
from ..tasks import task_group
from ..trajectory import Trajectory
from .sandbox import Sandbox


class Scorer(Protocol):
    """Gives rewards to the trajectories of one row of the data set."""

    async def score(
        self, row: PromptRow, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        """Return the trajectories with rewards. Those that failed get none.

        Args:
            environments: the project's environment object of each trajectory. Empty if there are none.

        Raises:
            UserError: a function raised or returned something invalid, and errors are not dropped.
        """
        ...


class Rewards:
    """Scores trajectories with all configured reward functions."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        drop_errors: bool,
        timeout_s: float,
    ) -> None:
        """Load the functions.

        Args:
            drop_errors: leave out a group when a function fails on it, instead of ending the run.
            timeout_s: time limit of a call, for rewards without their own `timeout_s`.

        Raises:
            UserError: a function does not exist, cannot be imported, or is named twice.
        """
        names = [config.function for config in configs]
        if len(set(names)) < len(names):
            raise UserError(
                f"trainer.rewards names a function twice: got {names}, expected each once. Fix: remove one."
            )
        turn = asyncio.Lock()
        self._sandboxes: list[Sandbox] = []
        self._sandboxed: set[str] = set()
        self._functions = [
            self._function(config, config.timeout_s or timeout_s, turn, drop_errors=drop_errors) for config in configs
        ]
        self._weights = [config.weight for config in configs]

    async def score(
        self, row: PromptRow, trajectories: Sequence[Trajectory], environments: Sequence[Any] = ()
    ) -> tuple[Trajectory, ...]:
        """Score them with all functions at the same time. See `Scorer`."""
        places = [place for place, trajectory in enumerate(trajectories) if trajectory.status != "failed"]
        scored = [trajectories[place] for place in places]
        if not scored:
            return tuple(trajectories)
        used = [environments[place] for place in places] if any(one is not None for one in environments) else []
        async with task_group() as calls:
            tasks = {
                function.name: calls.create_task(
                    function(
                        row,
                        len(scored),
                        completions=as_in_prompt(row, scored),
                        completion_ids=[list(trajectory.sampled_ids) for trajectory in scored],
                        **self._environments_for(function, used),
                    )
                )
                for function in self._functions
            }
        given = {name: task.result() for name, task in tasks.items()}
        rewarded = iter([self._rewarded(one, given, index) for index, one in enumerate(scored)])
        return tuple(one if one.status == "failed" else next(rewarded) for one in trajectories)

    def _environments_for(self, function: ProjectFunction[Any], environments: list[Any]) -> dict[str, Any]:
        """The argument `environments`, as in TRL, for functions that take it. A sandbox cannot share the objects."""
        is_given = (
            any(one is not None for one in environments)
            and function.name not in self._sandboxed
            and function.accepts("environments")
        )
        return {"environments": list(environments)} if is_given else {}

    async def close(self) -> None:
        """Stop the sandboxes."""
        for sandbox in self._sandboxes:
            await sandbox.close()

    def check_parameters(self, rows: Sequence[PromptRow]) -> None:
        """Check that each function can be called with the columns of these rows.

        Raises:
            UserError: a function cannot be called. The message names the function, the row and the parameter.
        """
        for function in self._functions:
            function.check_parameters(rows, REWARD_ARGUMENTS)

    def check_without_objects(self) -> None:
        """Check that no function needs the environment objects. Those on servers cannot be given to it.

        Raises:
            UserError: a function does.
        """
        for function in self._functions:
            if function.name not in self._sandboxed and function.requires("environments"):
                raise UserError(
                    f"reward function {function.name} has the parameter `environments`, but with "
                    "trainer.rollout.environment_urls the environment objects are in another process. Fix: compute "
                    "this reward in get_reward of the environment, or remove environment_urls."
                )

    def _function(
        self, config: RewardConfig, timeout_s: float, turn: asyncio.Lock, *, drop_errors: bool
    ) -> ProjectFunction[tuple[float | None, ...]]:
        kind = "reward function"
        name = config.function
        function = load_function(kind, name, config.arguments)
        call: Caller = in_process(function, timeout_s, turn)
        needs_sandbox = is_sandboxed(function) if config.sandbox is None else config.sandbox
        if needs_sandbox:
            self._sandboxed.add(name)
            call = Sandbox(name, config.arguments, timeout_s=timeout_s)
            self._sandboxes.append(call)
        return ProjectFunction(
            kind, name, function, call, check_rewards, arguments=config.arguments, drop_errors=drop_errors
        )

    def _rewarded(
        self, trajectory: Trajectory, given: Mapping[str, Sequence[float | None] | None], index: int
    ) -> Trajectory:
        """Add the rewards at `index`. If a function failed, the trajectory gets no total reward.

        The environment's own rewards, which the trajectory may have already, count with the weight 1.
        """
        own = trajectory.rewards
        rewards = {name: None if values is None else values[index] for name, values in given.items()}
        weighted = [w * r for w, r in zip(self._weights, rewards.values(), strict=True) if r is not None]
        weighted += [reward for reward in own.values() if reward is not None]
        total = sum(weighted) if weighted and None not in given.values() else None
        return trajectory.model_copy(update={"rewards": own | rewards, "reward": total})


def as_in_prompt(row: PromptRow, trajectories: Sequence[Trajectory]) -> list[Any]:
    """Return the completions as functions get them: text if the prompt is text, else conversations."""
    if isinstance(row.prompt, str):
        return [trajectory.completion[-1]["content"] if trajectory.completion else "" for trajectory in trajectories]
    return [copy.deepcopy(list(trajectory.completion)) for trajectory in trajectories]  # a function may change them
