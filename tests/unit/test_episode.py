"""An episode ends as documented, whatever the policy, the tools and the environment do."""

from __future__ import annotations

from typing import Any

import pytest

from support.episodes import Policy, Row, bpe_tokenizer, called, completion, renderer
from support.play import Made, Scripted, assert_is_what_the_policy_saw, loops, player
from tandem_rollout.environments import (
    Environments,
    SingleTurns,
    Step,
)
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turns import Turn


async def play(policy: Policy, environments: Environments | None = None, row: Any = None, **options: Any) -> Trajectory:
    environments = environments or loops()
    trajectory = await player(environments, **options).play(environments.make(), row or Row(), policy)
    assert_is_what_the_policy_saw(trajectory, policy)
    return trajectory


def roles(trajectory: Trajectory) -> list[Any]:
    return [message["role"] for message in trajectory.messages]


async def test_a_tool_is_called_and_its_result_is_read_and_not_trained() -> None:
    policy = Policy("Let me see. " + called("add", a=1, b=2), "It is 3.")
    trajectory = await play(policy)
    assert (trajectory.status, trajectory.turns, trajectory.tool_calls, trajectory.tool_errors) == ("finished", 2, 1, 0)
    assert roles(trajectory) == ["user", "assistant", "tool", "assistant"]
    assert [message["content"] for message in trajectory.completion][1:] == ["3", "It is 3."]
    (sequence,) = trajectory.sequences
    tool_tokens = sequence.token_ids[sequence.sampled[0].end : sequence.sampled[1].start]
    assert "<tool_response>\n3\n</tool_response>" in renderer("Qwen 3").decoded(tool_tokens)
    assert not any(sequence.mask[sequence.sampled[0].end : sequence.sampled[1].start])
    assert sequence.staleness(3).keys() <= {0, 1, 2}
    assert trajectory.timings.total_s >= trajectory.timings.environment_s > 0


async def test_several_calls_of_a_turn_are_answered_in_their_order() -> None:
    trajectory = await play(Policy(called("add", a=1, b=2) + called("add", a=3, b=4), "Done."))
    assert [m["content"] for m in trajectory.messages if m["role"] == "tool"] == ["3", "7"]
    assert trajectory.tool_calls == 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (called("subtract", a=1), '{"error": "there is no tool \'subtract\', only: add"}'),
        (called("add", a=1), '{"error": "b: Missing required argument"}'),
        (called("add", a=1, b="x"), '{"error": "b: expected a valid integer"}'),
        ("<tool_call>add 1 2</tool_call>", "Your tool call cannot be read: Expecting value: line 1 column 1 (char 0)"),
    ],
)
async def test_a_wrong_call_is_answered_and_counted_and_the_policy_goes_on(text: str, answer: str) -> None:
    trajectory = await play(Policy(text, "Well."))
    assert trajectory.messages[2]["content"] == answer
    assert (trajectory.status, trajectory.tool_calls, trajectory.tool_errors) == ("finished", 1, 1)


async def test_a_call_beyond_the_one_that_the_template_shows_is_answered_with_its_result() -> None:
    call = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
    policy = Policy(f"{call}; {call}", "Done.", name="Llama 3")
    trajectory = await play(policy, name="Llama 3")
    assert str(trajectory.messages[2]["content"]).startswith('3\n{"error": "got 2 tool calls')
    assert (trajectory.tool_calls, trajectory.tool_errors) == (2, 1)


async def test_a_policy_that_never_stops_calling_reaches_the_limit_of_turns() -> None:
    """Its last call is carried out, because it may change the environment, but the policy does not read the answer."""
    counted: list[int] = []

    def count() -> int:
        """Count."""
        counted.append(1)
        return len(counted)

    trajectory = await play(Policy(called("count")), loops(count), max_turns=4)
    assert (trajectory.status, trajectory.turns, trajectory.tool_calls) == ("max_turns", 4, 4)
    assert len(counted) == 4
    assert roles(trajectory)[-1] == "assistant"


async def test_a_turn_that_is_cut_off_by_the_episodes_limit_ends_the_episode() -> None:
    policy = Policy("word " * 50)
    trajectory = await play(policy, max_tokens=20)
    assert (trajectory.status, trajectory.num_sampled, trajectory.tool_calls) == ("max_tokens", 20, 0)


async def test_tokens_of_tools_count_towards_the_limit_of_the_episode() -> None:
    def long() -> str:
        """Say a lot."""
        return "word " * 30

    policy = Policy(called("long"))
    trajectory = await play(policy, loops(long), max_tokens=200, max_turns=100)
    assert trajectory.status == "max_tokens"
    (sequence,) = trajectory.sequences
    assert len(sequence.token_ids) - len(policy.calls[0][0]) <= 200
    assert roles(trajectory)[-1] == "assistant"  # what the policy did not read is not in the conversation
    fits = await play(Policy(called("long")), loops(long), max_tokens=2000, max_turns=3)
    assert fits.status == "max_turns"


async def test_the_models_length_ends_an_episode() -> None:
    prompt = len(
        renderer("Qwen 3").tokens(renderer("Qwen 3").text([{"role": "user", "content": "Hi."}], loops().schemas))
    )
    trajectory = await play(Policy(called("add", a=1, b=2)), max_model_len=prompt + 100, max_turns=100)
    assert trajectory.status == "max_tokens"
    assert len(trajectory.sequences[0].token_ids) <= prompt + 100
    assert (await play(Policy("Hi."), max_model_len=prompt)).num_sampled == 0


async def test_a_turn_that_is_cut_off_by_its_own_limit_is_closed_by_the_template() -> None:
    """The rest of the episode goes on, and the token that ends the turn is not trained."""
    policy = Policy("<tool_call> " + "word " * 50, "Well.", ended=False)
    trajectory = await play(policy, max_turn_tokens=10)
    assert (trajectory.status, trajectory.turns, trajectory.tool_errors) == ("finished", 2, 1)
    (sequence,) = trajectory.sequences
    end = bpe_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert (sequence.token_ids[sequence.sampled[0].end], sequence.mask[sequence.sampled[0].end]) == (end, 0)


async def test_a_single_turn_uses_the_tokens_of_the_data_set() -> None:
    policy = Policy(f"42 {called('add')}", name="ChatML")
    trajectory = await play(policy, SingleTurns(), Row("What?", (7, 8, 9)), name="ChatML")
    assert policy.calls[0][0] == (7, 8, 9)
    assert (trajectory.status, trajectory.turns) == ("finished", 1)
    assert trajectory.messages == (
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": f"42 {called('add')}"},
    )


async def test_a_started_answer_is_continued_and_rendered_as_one_message() -> None:
    class Chat(Scripted):
        async def step(self, turn: Turn) -> Step:
            return Step([{"role": "user", "content": "Go on."}])

    opened = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "I think"}]
    policy = Policy(" that 42.", name="Gemma")  # Gemma's template refuses two messages of the assistant in a row
    environments = Made(lambda: Chat(opened))
    trajectory = await player(environments, name="Gemma", max_turns=2).play(environments.make(), Row(), policy)
    assert [m["content"] for m in trajectory.completion] == [" that 42.", "Go on.", " that 42."]
    (sequence,) = trajectory.sequences
    asked = "<s><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nI think"
    shown = f"{asked} that 42.<end_of_turn>\n<start_of_turn>user\nGo on."
    assert renderer("Gemma").decoded(sequence.token_ids).startswith(shown)
    assert sequence.token_ids[: sequence.sampled[0].start] == policy.calls[0][0]


async def test_with_the_templates_history_thinking_is_dropped_and_every_turn_is_trained_once() -> None:
    class Chat(Scripted):
        async def step(self, turn: Turn) -> Step:
            return Step([{"role": "user", "content": "And now?"}])

    policy = Policy("<think>\nhm\n</think>\n\nOne.", name="Qwen 3, thinking")
    environments = Made(lambda: Chat([{"role": "user", "content": "Hi."}]))
    one = player(environments, name="Qwen 3, thinking", history="template")
    trajectory = await one.play(environments.make(), Row(), policy)
    assert len(trajectory.sequences) == trajectory.turns == 5
    assert trajectory.num_sampled == sum(len(c.token_ids) for _, c in policy.calls)
    for prompt, _ in policy.calls:
        assert "hm" not in renderer("Qwen 3, thinking").decoded(prompt)


async def test_a_policy_that_samples_anything_breaks_no_episode() -> None:
    environments = loops()
    one = player(environments, max_turns=4, max_tokens=300)
    for seed in range(60):
        policy = Random(seed=seed)
        trajectory = await one.play(environments.make(), Row(), policy)
        assert_is_what_the_policy_saw(trajectory, policy)
        assert trajectory.status in ("finished", "max_turns", "max_tokens")
        assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


class Random(Policy):
    """A policy early in training."""

    async def __call__(self, prompt_ids: tuple[int, ...], *, max_tokens: int, turn: int) -> Any:
        pieces = [called("add", a=1, b=2), "<tool_call>", '{"name": "add"', "</tool_call>", "<think>", "</think>", " "]
        ids: list[int] = []
        for _ in range(self._chance.randint(1, 6)):
            ids += bpe_tokenizer()(self._chance.choice(pieces), add_special_tokens=False).input_ids
            ids += [self._chance.randrange(len(bpe_tokenizer())) for _ in range(self._chance.randint(0, 3))]
        reason = "stop" if len(ids) <= max_tokens else "length"
        answer = completion(ids[:max_tokens], self._chance, finish_reason=reason)
        self.calls.append((prompt_ids, answer))
        return answer
