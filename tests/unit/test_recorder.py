"""What the learner trains on is, token by token, what the policy saw and sampled."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from support.episodes import (
    ALL_TEMPLATES,
    END_OF_TURN,
    WITH_TOOLS,
    bpe_tokenizer,
    completion,
    metaspace_tokenizer,
    odd_ids,
    renderer,
)
from tandem_protocol.messages import Completion
from tandem_rollout.recorder import Recorder
from tandem_rollout.rendering import Renderer
from tandem_rollout.trajectory import Sequence

TEXTS = [
    *("", "Hello.", "42", "yes", "no", "I said yes and no.", '{"a":1,"b":[1,2]}', "a <b> </c> {{ d }} {% e %}"),
    *("  spaces on both sides  ", "ends with a line\n", "\n\nbegins with lines", "tab\tand\r\nreturn"),
    "Grüße, 你好, 🙂 🇩🇪 e\u0301",
]
ARGUMENTS: list[dict[str, Any]] = [
    *({}, {"a": 1}, {"a": 1, "b": "x"}, {"yes": "no", "n": [{"x": None}]}),
    {"q": "Grüße 🙂\n \"'\\"},
]


REWRITING = {"Qwen 3", "Qwen 3, thinking", "DeepSeek R1"}
"""Templates that render a turn of the assistant differently once another message follows."""


class Episode:
    """Drives a recorder with random turns, and keeps the prompts and the samples that the policy has seen."""

    def __init__(self, name: str, seed: int, history: Any = "keep") -> None:
        self.chance = random.Random(f"{name} {seed}")
        self.name = name
        self.renderer = renderer(name)
        self.recorder = Recorder(self.renderer, history)
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi. " + self.chance.choice(TEXTS)}]
        self.calls: list[tuple[tuple[int, ...], Completion]] = []
        self.added: list[list[dict[str, Any]]] = []
        """The messages that followed each turn."""

    def play(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()

    def turn(self) -> None:
        prompt = self.recorder.prompt(self.messages)
        text, message = self.says()
        ids = odd_ids(text, self.chance)
        if self.chance.random() < 0.8:  # otherwise the turn was cut off
            end = END_OF_TURN.get(self.name, "</s>")
            ids += (bpe_tokenizer().convert_tokens_to_ids(self.chance.choice([end, end, end, "</s>"])),)
        sampled = completion(ids or (5,), self.chance)
        self.calls.append((prompt, sampled))
        self.messages = [*self.messages, message]
        self.recorder.record(self.messages, (), prompt, sampled)
        self.added.append(self.answers(message))
        self.messages = [*self.messages, *self.added[-1]]

    def says(self) -> tuple[str, dict[str, Any]]:
        """Return the sampled text, and the message that it was parsed into."""
        text = self.chance.choice(TEXTS)
        thought = self.chance.choice(["", "", "<think>\nhm, yes\n</think>\n\n"])
        if self.name not in WITH_TOOLS or self.chance.random() < 0.4:
            return thought + text, {"role": "assistant", "content": thought + text}
        said = self.chance.choice(["", "", "Let me see.\n", text])
        calls = [self.call(index) for index in range(1 if self.name == "Llama 3" else self.chance.randint(1, 2))]
        written = [
            json.dumps(
                call["function"],
                separators=self.chance.choice([(",", ":"), (", ", ": ")]),
                ensure_ascii=self.chance.random() < 0.5,
            )
            for call in calls
        ]
        sampled = "".join(f"\n<tool_call>{text_}</tool_call>" for text_ in written)
        return thought + said + sampled, {"role": "assistant", "content": said, "tool_calls": calls}

    def call(self, index: int) -> dict[str, Any]:
        function = {"name": self.chance.choice(["add", "look_up"]), "arguments": self.chance.choice(ARGUMENTS)}
        return {"id": f"call{index:05d}", "type": "function", "function": function}

    def answers(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if calls := message.get("tool_calls"):
            return [
                {"role": "tool", "tool_call_id": c["id"], "name": c["function"]["name"], "content": self.result()}
                for c in calls
            ]
        return [{"role": "user", "content": f"Go on: {self.chance.choice(TEXTS)} {len(self.messages)}"}]

    def result(self) -> str:
        return f"r{self.chance.randint(0, 9)} " + self.chance.choice([text for text in TEXTS if text.strip()])


def assert_the_learner_gets_what_the_policy_saw(episode: Episode, sequences: tuple[Sequence, ...]) -> None:
    """Every call is in a sequence: its prompt, and behind it its sampled tokens, and nothing else is sampled."""
    found = []
    for sequence in sequences:
        for span in sequence.sampled:
            prompt, turn = sequence.token_ids[: span.start], sequence.token_ids[span.start : span.end]
            found.append((prompt, turn, sequence.logprobs[span.start : span.end]))
    assert sorted(found) == sorted((prompt, c.token_ids, c.logprobs) for prompt, c in episode.calls)
    assert sum(sum(s.mask) for s in sequences) == sum(len(c.token_ids) for _, c in episode.calls)
    steps = sorted(step for s in sequences for step in s.steps if step >= 0)
    assert steps == sorted(v.version.step for _, c in episode.calls for v in c.versions for _ in range(v.tokens))


@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_an_episode_is_one_sequence_of_what_the_policy_saw_and_sampled(name: str) -> None:
    for seed in range(40):  # 14 templates × 40 = 560 episodes
        episode = Episode(name, seed)
        episode.play(episode.chance.randint(1, 5))
        (sequence,) = episode.recorder.sequences()
        assert_the_learner_gets_what_the_policy_saw(episode, (sequence,))
        last_prompt, last = episode.calls[-1]
        assert sequence.token_ids == last_prompt + last.token_ids
        assert episode.recorder.rewritten == 0


@pytest.mark.parametrize("name", sorted(ALL_TEMPLATES.keys() - {"Gemma 4"}))
def test_what_follows_a_turn_is_what_the_template_writes_there(name: str) -> None:
    """Between two turns stand the end of the first (unless it was sampled), all new messages, and the opened turn."""
    for seed in range(15):
        episode = Episode(name, seed)
        episode.play(4)
        until = 1
        for number, (prompt, sampled) in enumerate(episode.calls[:-1]):
            following = episode.calls[number + 1][0]
            until += 1 + len(episode.added[number])
            between = following[len(prompt) + len(sampled.token_ids) :]
            text = episode.renderer.decoded(between)
            assert episode.renderer.text(episode.messages[:until], ()).endswith(text)
            assert bool({sampled.token_ids[-1], between[0]} & episode.renderer.end_of_turn)
            assert sampled.token_ids[-1] != between[0]
            assert all(shows(text, message["content"]) for message in episode.added[number])


@pytest.mark.parametrize("said", ["", "Let me see."])
def test_results_that_the_template_writes_before_the_text_of_their_turn_are_read_all_the_same(said: str) -> None:
    """Gemma 4 writes a turn's text behind the results of its calls. The policy has said it before, and only once."""
    one = renderer("Gemma 4")
    recorder = Recorder(one)
    call = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [user("Hi."), {"role": "assistant", "content": said, "tool_calls": [call]}]
    prompt = recorder.prompt(messages[:1])
    turn = completion(one.tokens(f'{said}<|tool_call>add{{"a": 1}}<tool_call|><|tool_response>'))
    recorder.record(messages, (), prompt, turn)
    messages += [{"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "42"}]
    behind = recorder.prompt(messages)[len(prompt) + len(turn.token_ids) :]
    assert one.decoded(behind) == "42<tool_response|>"


@pytest.mark.parametrize(("sampled", "then"), [("<|im_end|>", "\n"), ("</s>", "<|im_end|>\n"), ("", "<|im_end|>\n")])
def test_the_token_that_ends_a_turn_is_left_out_only_if_the_policy_sampled_it(sampled: str, then: str) -> None:
    one = renderer("ChatML")
    recorder = Recorder(one)
    messages = [user("Hi."), {"role": "assistant", "content": "Hello."}]
    prompt = recorder.prompt(messages[:1])
    turn = completion(one.tokens(f"Hello.{sampled}"))
    recorder.record(messages, (), prompt, turn)
    behind = recorder.prompt([*messages, user("Go on.")])[len(prompt) + len(turn.token_ids) :]
    assert one.decoded(behind) == f"{then}<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"


def shows(text: str, said: str) -> bool:
    """Whether the text contains what was said, as it is or as JSON. Templates may trim white space."""
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (said, json.dumps(said, ensure_ascii=False)[1:-1]))


@pytest.mark.parametrize("make_tokenizer", [bpe_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("name", sorted(ALL_TEMPLATES.keys() - REWRITING - {"a vision model's"}))
def test_what_follows_a_turn_is_tokenized_as_in_the_whole_conversation(name: str, make_tokenizer: Any) -> None:
    """If the policy samples what the tokenizer would write, every prompt is what the tokenizer makes of it.

    The vision model's template opens a turn with a space, which the tokenizer joins with the turn's first word.
    """
    one = renderer(name, tokenizer=make_tokenizer())
    recorder = Recorder(one)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is it?"}]
    for turn in range(3):
        prompt = recorder.prompt(messages)
        assert prompt == one.tokens(one.text(messages, ()))
        answered = [*messages, {"role": "assistant", "content": f"It is {turn}, I think."}]
        messages = [*answered, {"role": "user", "content": f"Sure? {turn}"}]
        behind = one.tokens(one.text(messages, ()))[len(prompt) :]
        end = next(index for index, token in enumerate(behind) if token in one.end_of_turn)
        recorder.record(answered, (), prompt, completion(behind[: end + 1]))


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Mistral", "Qwen 2.5", "Phi 3", "Zephyr", "InternLM", "Gemma"])
def test_a_conversation_that_the_template_keeps_is_rendered_as_the_template_does(name: str) -> None:
    one = renderer(name)
    recorder = Recorder(one)
    chance = random.Random(1)
    messages = [{"role": "user", "content": "What is it?"}]
    for turn in range(3):
        prompt = recorder.prompt(messages)
        assert one.decoded(prompt) == one.text(messages, ())
        said = f"It is {turn}, I think."
        space = " " if name in ("Mistral",) else ""
        ids = odd_ids(space + said, chance) + tuple(sorted(one.end_of_turn))[-1:]
        messages = [*messages, {"role": "assistant", "content": said}]
        recorder.record(messages, (), prompt, completion(ids))
        messages = [*messages, {"role": "user", "content": f"Sure? {turn}"}]


@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_with_the_templates_history_every_prompt_says_what_the_template_says(name: str) -> None:
    for seed in range(15):
        episode = Episode(name, seed, "template")
        for _ in range(4):
            messages = episode.messages
            episode.turn()
            prompt, _ = episode.calls[-1]
            assert episode.renderer.decoded(prompt) == episode.renderer.text(messages, ())
        assert_the_learner_gets_what_the_policy_saw(episode, episode.recorder.sequences())
        assert len(episode.recorder.sequences()) <= 1 + episode.recorder.rewritten


def thinking(recorder: Recorder, one: Renderer) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Q"}]
    for turn in range(2):
        prompt = recorder.prompt(messages)
        text = f"<think>\nT{turn}\n</think>\n\nA{turn}"
        sampled = completion(one.tokens(text + "<|im_end|>"))
        messages = [*messages, {"role": "assistant", "content": text}]
        recorder.record(messages, (), prompt, sampled)
        messages = [*messages, {"role": "user", "content": f"Q{turn}"}]


def test_history_keep_shows_the_policy_its_thinking_and_template_drops_it() -> None:
    one = renderer("Qwen 3, thinking")
    keep, template = Recorder(one), Recorder(one, "template")
    thinking(keep, one)
    thinking(template, one)
    (whole,) = keep.sequences()
    assert one.decoded(whole.token_ids).count("T0") == 1
    first, second = template.sequences()
    assert "T0" in one.decoded(first.token_ids)
    assert "T0" not in one.decoded(second.token_ids)
    assert "A0" in one.decoded(second.token_ids)
    assert second.sampled[0].start == second.token_ids.index(one.tokens("<think>")[0])  # only A1's turn is trained


class Talk:
    """One recorder that an agent talks to. It says fixed texts."""

    def __init__(self, name: str = "ChatML") -> None:
        self.renderer = renderer(name)
        self.recorder = Recorder(self.renderer)

    def ask(self, messages: list[dict[str, Any]], says: str, **message: Any) -> list[dict[str, Any]]:
        prompt = self.recorder.prompt(messages)
        ids = self.renderer.tokens(says + END_OF_TURN["ChatML"])
        asked = [*messages, {"role": "assistant", "content": says, **message}]
        self.recorder.record(asked, (), prompt, completion(ids))
        return asked

    def shown(self) -> list[list[str]]:
        """The sampled turns of each sequence."""
        return [
            [self.renderer.decoded(s.token_ids[span.start : span.end]).removesuffix("<|im_end|>") for span in s.sampled]
            for s in self.recorder.sequences()
        ]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_fork_begins_a_sequence_and_trains_what_it_shares_once() -> None:
    talk = Talk()
    trunk = talk.ask([user("a")], "one")
    left = talk.ask([*trunk, user("b")], "two")
    talk.ask([*trunk, user("c")], "three")
    talk.ask([*left, user("d")], "four")
    talk.ask([user("another agent")], "five")
    assert talk.shown() == [["one", "two", "four"], ["three"], ["five"]]


def test_a_client_may_write_a_conversation_in_its_own_way() -> None:
    talk = Talk("Qwen 3")
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [1, 2]}}}
    talk.ask([user("a")], "one  \n", tool_calls=[call], reasoning_content="hm")
    other = {"id": "y", "type": "function", "function": {"name": "f", "arguments": '{"a":[1,2],"b":1}'}}
    rewritten = {"role": "assistant", "content": "one", "tool_calls": [other]}
    result = {"role": "tool", "tool_call_id": "y", "name": "f", "content": "3"}
    talk.ask([user(" a"), rewritten, result], "two")
    assert talk.shown() == [["one  \n", "two"]]


def test_an_exact_match_is_preferred_to_one_that_differs_in_white_space() -> None:
    talk = Talk()
    first = talk.ask([user("a")], "x y")
    second = talk.ask([user("a")], "x  y")
    talk.ask([*first, user("b")], "one")
    talk.ask([*second, user("b")], "two")
    assert talk.shown() == [["x y", "one"], ["x  y", "two"]]


def test_changed_messages_tools_or_system_prompts_begin_a_sequence() -> None:
    talk = Talk()
    asked = talk.ask([user("a")], "one")
    talk.ask([user("A"), *asked[1:], user("b")], "two")
    talk.ask([{"role": "system", "content": "s"}, *asked, user("b")], "three")
    talk.ask([asked[0], {**asked[1], "content": "uno"}, user("b")], "four")
    assert talk.shown() == [["one"], ["two"], ["three"], ["four"]]
    schema = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert talk.recorder.prompt([*asked, user("b")], [schema]) == talk.renderer.tokens(
        talk.renderer.text([*asked, user("b")], [schema])
    )


def test_a_turn_that_the_template_does_not_show_begins_a_sequence() -> None:
    talk = Talk()
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    talk.renderer = talk.recorder._renderer = renderer("", chat_template=silent, end_of_turn="<|im_end|>")
    asked = talk.ask([user("a")], "one")
    talk.ask([*asked, user("b")], "two")
    assert talk.shown() == [["one"], ["two"]]
    assert talk.recorder.rewritten == 1
