"""Functions of every kind get copies of their arguments, and their answers are checked, in process and in a sandbox."""

from __future__ import annotations

import asyncio
import copy
import functools
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import reward_kinds
from support.models import make_tokenizer
from support.reward_kinds import CALLABLES, NO_NUMBERS, NUMBERS
from support.rollouts import completion, read, rewards_by_name, rewards_of
from tandem_protocol.config.rollout import RewardConfig
from tandem_rollout.errors import UserError
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.judge import Judge
from tandem_rollout.rewards.scoring import Rewards
from tandem_rollout.trajectory import Trajectory

TOKENIZER = make_tokenizer(80)
COMPLETIONS = [completion(TOKENIZER(text).input_ids) for text in ("12", "a")]
CONVERSATION = [{"role": "user", "content": "hi"}]
TESTS = Path(__file__).parents[1]


def _row(prompt: Any = "1+2=", **columns: Any) -> PromptRow:
    return PromptRow(7, "prompts.jsonl row 7", prompt, "text", (4, 5), columns)


def _unscored(row: PromptRow) -> tuple[Trajectory, ...]:
    return read(TOKENIZER, row, COMPLETIONS)


def _rewards(
    *names: str, sandbox: bool = False, drop: bool = False, timeout_s: float = 60, **arguments: Any
) -> Rewards:
    configs = [RewardConfig(function=name, sandbox=sandbox, arguments=arguments) for name in names]
    return Rewards(configs, drop_errors=drop, timeout_s=timeout_s)


def _kinds(*names: str, **options: Any) -> Rewards:
    return _rewards(*(f"support.reward_kinds:{name}" for name in names), **options)


@pytest.fixture
def project() -> Iterator[Any]:
    """A module of the user's project, to which tests add functions."""
    module = types.ModuleType("user_functions")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sandbox process import `support`."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")


COLUMNS = {
    "text": "x",
    "list": ["x", ["y"]],
    "object": {"a": {"b": [1]}},
    "nothing": None,
}


def test_a_function_that_changes_its_arguments_affects_nothing_else(project: Any):
    """Checks the call's second item, another function, the next call, the row, the configuration and the record."""
    one: list[dict[str, Any]] = []
    two: list[dict[str, Any]] = []
    project.one = reward_kinds.spoiling(one)
    project.two = reward_kinds.spoiling(two)
    row = _row(copy.deepcopy(CONVERSATION), **copy.deepcopy(COLUMNS))
    options = {"weights": [1, {"a": []}]}
    rewards = _rewards("user_functions:one", "user_functions:two", options=options)
    group = _unscored(row)
    before = [one.model_dump() for one in group]

    async def score_twice() -> list[Any]:
        return [await rewards.score(row, group) for _ in range(2)]

    scored = asyncio.run(score_twice())
    assert len({repr(seen) for seen in [*one, *two]}) == 1
    assert "spoilt" not in repr(one)
    assert (row.prompt, row.columns) == (CONVERSATION, COLUMNS)
    assert options == {"weights": [1, {"a": []}]}
    assert [one.model_dump() for one in group] == before
    assert scored[0] == scored[1]
    assert [one.completion[0]["content"] for one in scored[0]] == ["12", "a"]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("sandbox", [False, True])
async def test_each_call_gets_the_configured_arguments_unchanged(sandbox: bool):
    rewards = _kinds("unspoilt", sandbox=sandbox, spoilt=[])
    row = _row(copy.deepcopy(CONVERSATION), **copy.deepcopy(COLUMNS))
    assert [rewards_of(await rewards.score(row, _unscored(row))) for _ in range(2)] == [(1.0, 1.0)] * 2
    await rewards.close()


async def test_a_judge_gets_copies_of_its_arguments(project: Any):
    seen: list[str] = []

    def prefer(**arguments: Any) -> list[int]:
        seen.append(repr(arguments))
        reward_kinds.spoil(arguments)
        return [0]

    project.prefer = prefer
    judge = Judge("user_functions:prefer", drop_errors=False, timeout_s=60)
    row = _row(copy.deepcopy(CONVERSATION), **copy.deepcopy(COLUMNS))
    for _ in range(2):
        await judge.score(row, _unscored(row))
    assert seen[0] == seen[1]
    assert (row.prompt, row.columns) == (CONVERSATION, COLUMNS)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("sandbox", [False, True], ids=["in process", "sandbox"])
async def test_every_kind_of_callable_can_be_called_repeatedly(sandbox: bool):
    """One test for all kinds, because a sandbox is slow to start."""
    rewards = _kinds(*CALLABLES, sandbox=sandbox)
    for _ in range(2):
        scored = await rewards.score(_row(), _unscored(_row()))
        assert rewards_by_name(scored) == {f"support.reward_kinds:{name}": (2.0, 1.0) for name in CALLABLES}
    await rewards.close()
    reward_kinds._loops.clear()


@pytest.mark.parametrize("kind", ["async_object", "decorated", "partial"])
async def test_asynchronous_callables_run_concurrently(project: Any, kind: str):
    """Each waits for the other, so if they ran one after the other, both would miss their deadline."""
    here, there = asyncio.Event(), asyncio.Event()

    def make(ours: asyncio.Event, theirs: asyncio.Event) -> Any:
        class Reward:
            async def __call__(self, **_: Any) -> list[float]:
                ours.set()
                await theirs.wait()
                return [1.0, 0.0]

        reward = Reward()
        return {
            "async_object": reward,
            "decorated": reward_kinds.decorated(reward),
            "partial": functools.partial(reward, unused=1),
        }[kind]

    project.one, project.two = make(here, there), make(there, here)
    scored = await _rewards("user_functions:one", "user_functions:two", timeout_s=60).score(_row(), _unscored(_row()))
    assert rewards_of(scored) == (2.0, 0.0)


@pytest.mark.parametrize("kind", ["function", "object", "partial"])
async def test_asynchronous_callables_do_not_wait_for_synchronous_ones(project: Any, kind: str):
    """The synchronous function is called first, and waits until the asynchronous one has started."""
    begun = threading.Event()

    async def function(**_: Any) -> list[float]:
        begun.set()
        return [1.0, 0.0]

    class Reward:
        async def __call__(self, **_: Any) -> list[float]:
            return await function()

    project.one = lambda **_: [float(begun.wait(60)), 0.0]
    project.two = {"function": function, "object": Reward(), "partial": functools.partial(Reward())}[kind]
    scored = await _rewards("user_functions:one", "user_functions:two").score(_row(), _unscored(_row()))
    assert rewards_of(scored) == (2.0, 0.0)


@pytest.mark.parametrize("kind", ["object", "decorated"])
async def test_a_late_asynchronous_callable_can_be_dropped(project: Any, kind: str):
    class Late:
        async def __call__(self, **_: Any) -> list[float]:
            await asyncio.sleep(60)
            return [1.0, 0.0]

    project.late = Late() if kind == "object" else reward_kinds.decorated(Late())
    scored = await _rewards("user_functions:late", drop=True, timeout_s=0.05).score(_row(), _unscored(_row()))
    assert rewards_of(scored) == (None, None)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("sandbox", [False, True], ids=["in process", "sandbox"])
async def test_only_finite_numbers_are_accepted_as_rewards(sandbox: bool):
    rewards = _kinds("numbers_of", sandbox=sandbox)
    for kind, (_, expected) in NUMBERS.items():
        assert list(rewards_of(await rewards.score(_row(kind=kind), _unscored(_row())))) == expected, kind
    # A sandbox restarts after an error, which is slow.
    refused = ["NaN", "a NumPy string", "too few"] if sandbox else NO_NUMBERS
    for kind in refused:
        words = NO_NUMBERS[kind][1]
        with pytest.raises(UserError) as error:
            await rewards.score(_row(kind=kind), _unscored(_row()))
        assert words in str(error.value), kind
        assert "prompts.jsonl row 7" in str(error.value)
    await rewards.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_torch_scalars_and_tensors_are_accepted_as_rewards(project: Any, dtype: torch.dtype):
    tensor = torch.tensor([1, 0], dtype=dtype)
    for answer in (tensor, list(tensor), [tensor[0], tensor[1].item()]):
        project.reward = lambda answer=answer, **_: answer
        scored = asyncio.run(_rewards("user_functions:reward").score(_row(), _unscored(_row())))
        assert rewards_of(scored) == (1.0, 0.0)


def _check(project: Any, function: Any, rows: list[PromptRow], *, drop: bool = False, **arguments: Any) -> None:
    project.reward = function
    _rewards("user_functions:reward", drop=drop, **arguments).check_parameters(rows)


def test_a_column_with_the_name_of_an_argument_is_refused_at_the_start(project: Any):
    rows = [_row(answer="1"), PromptRow(8, "held_out.jsonl row 8", "a", "a", (4,), {"pattern": "x"})]
    with pytest.raises(
        UserError, match=r"configured argument 'pattern' has the name of .* held_out.jsonl row 8.*Fix: rename"
    ):
        _check(project, lambda pattern, **_: [], rows, pattern="y")
    with pytest.raises(UserError, match="configured argument 'completions' has the name of"):
        _check(project, lambda **_: [], rows, completions=[])
    _check(project, lambda option, **_: [], rows, option=1)


def test_a_function_that_does_not_accept_its_arguments_is_refused_at_the_start(project: Any):
    rows = [_row(answer="1", level=2), PromptRow(8, "prompts.jsonl row 8", "a", "a", (4,), {"answer": "1"})]
    with pytest.raises(UserError, match=r"row 7: got an unexpected .* argument '\w+'.*add \*\*columns"):
        _check(project, lambda completions, answer: [], rows)
    with pytest.raises(UserError, match=r"row 8: missing a required argument: 'level'.*Fix: add the column"):
        _check(project, lambda completions, answer, level, **_: [], rows)
    _check(project, lambda completions, answer, level, **_: [], rows, drop=True)
    _check(project, lambda completions, answer, level=1, **_: [], rows)
    _check(project, lambda completions, **_: [], rows)


def test_a_judge_that_does_not_accept_its_arguments_is_refused_at_the_start(project: Any):
    project.prefer = lambda prompts, completions: [0]
    judge = Judge("user_functions:prefer", drop_errors=False, timeout_s=60)
    judge.check_parameters([_row()])
    with pytest.raises(UserError, match=r"judge user_functions:prefer cannot be called .* row 7.*'answer'"):
        judge.check_parameters([_row(answer="1")])


def test_a_class_is_refused_with_the_fix(project: Any):
    project.Reward = reward_kinds.Asynchronous
    with pytest.raises(UserError, match=r"user_functions:Reward is a class, expected .*score = Reward\(\)"):
        _rewards("user_functions:Reward")


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", ["with_alarm", "with_math_verify"])
async def test_a_time_limit_that_uses_a_signal_works_in_a_sandbox_and_is_refused_in_a_thread(name: str):
    sandboxed = _kinds(name, sandbox=True)
    assert rewards_of(await sandboxed.score(_row(), _unscored(_row()))) == (1.0, 1.0)
    await sandboxed.close()
    with pytest.raises(
        UserError, match=r"row 7: .*uses a signal\. Signals work in the main thread only.*`sandbox: true`"
    ):
        await _kinds(name).score(_row(), _unscored(_row()))


@pytest.mark.parametrize("drop", [False, True])
async def test_a_function_that_cancels_itself_has_failed(project: Any, drop: bool) -> None:
    async def cancels_itself(completions: list[str], **_: Any) -> list[float]:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner
        return [0.0] * len(completions)

    project.cancels_itself = cancels_itself
    rewards, row = _rewards("user_functions:cancels_itself", drop=drop), _row()
    if drop:
        assert {one.reward for one in await rewards.score(row, _unscored(row))} == {None}
    else:
        with pytest.raises(UserError, match="cancelled itself"):
            await rewards.score(row, _unscored(row))
