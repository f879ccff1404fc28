"""Random episodes of several turns. All that is between the generator and the trajectory is the product's.

The policy writes text, thinking, tool calls in the format of its model, special tokens, and nothing at all. It cuts its
text into tokens at random places, as a model may and a tokenizer does not.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from support.episodes import END_OF_TURN, RESPONSE_TEMPLATE, WITH_TOOLS, Row, bpe_tokenizer, odd_ids, renderer
from tandem_protocol.messages import Completion, Group, RolloutRequest, Sampling, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.agents import plain_messages
from tandem_rollout.environments import ClassEnvironments, Done
from tandem_rollout.episode import Limits, Player
from tandem_rollout.rendering import Renderer, Schema
from tandem_rollout.sessions import ChatCall, Session
from tandem_rollout.tools import Tool
from tandem_rollout.trajectory import Sequence as TokenSequence
from tandem_rollout.trajectory import Trajectory
from tandem_rollout.turn_sampler import TurnSampler
from tandem_rollout.turns import TurnReader

PARSED = "Qwen 3, with a response template"
TEMPLATES = ("ChatML", "Llama 3", "Qwen 2.5", "Qwen 3, thinking", PARSED, "Gemma", "Gemma 4", "Mistral")
"""Names in `ALL_TEMPLATES`, and Qwen 3 with transformers' own parser, which takes the thinking out of the text."""
WITHOUT_SYSTEM = ("Gemma", "Gemma 4", "Mistral")
TEXTS = [
    *("", " ", "\n", "Hello.", "42", "yes", "no", "  spaces on both sides  ", "ends with lines\n\n", "\n\nbegins so"),
    *('{"a":1}', "a <b> </c> {{ d }} {% e %}", "tab\tand\r\nreturn", "Grüße, 你好, 🙂 🇩🇪 e\u0301"),
    *("<|im_start|>user\nI am you.", "half a <|tool_call>", "a <|eot_id|> within", "</think>", "<tool_response>3"),
]
ADDED = {"a": 1, "b": 2}
LOOKED_UP = {"text": "Grüße 🙂\n \"'\\"}
LIMITS = Limits(max_tokens=2500, max_turns=7)
SWITCHES_IN_TURN = 1
"""The weights change within this turn, counted from 0."""


def gemma_4_calls(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Read `<|tool_call>add{"a": 1}<tool_call|>`."""
    calls = re.findall(r"<\|tool_call>(\w+)(\{.*?\})<tool_call\|>", text, re.DOTALL)
    said = re.sub(r"<\|tool_call>\w+\{.*?\}<tool_call\|>", "", text, flags=re.DOTALL)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


class Writer:
    """Writes what a policy could say."""

    def __init__(self, template: str, chance: random.Random) -> None:
        self._template = template
        self._chance = chance

    def turn(self) -> str:
        """The text of a turn, without the token that ends it."""
        thought = self._chance.choice(
            ["", "", "", "<think>\nhm, yes\n</think>\n\n", "<think>\n\n</think>\n\n", "<think>"]
        )
        if not _has_tools(self._template) or self._chance.random() < 0.35:
            return thought + self._chance.choice(TEXTS)
        calls = [self._call() for _ in range(self._chance.choice([1, 1, 2]))]
        before = self._chance.choice(["", "", "Let me see.\n", self._chance.choice(TEXTS)])
        behind = self._chance.choice(["", "", " ", "\n", " That was it."])
        return thought + before + self._joined(calls) + behind

    def _call(self) -> tuple[str, str]:
        compact = self._chance.random() < 0.5
        separators = (",", ":") if compact else (", ", ": ")
        name, arguments = self._chance.choice([("add", ADDED), ("look_up", LOOKED_UP), (self._name(), self._wrong())])
        written = json.dumps(arguments, separators=separators, ensure_ascii=self._chance.random() < 0.5)
        return name, written[: self._chance.choice([99, 99, 99, 99, 5])]

    def _name(self) -> str:
        return self._chance.choice(["add", "look_up", "nothing"])

    def _wrong(self) -> dict[str, Any]:
        return self._chance.choice([{"a": 1}, {"n": [{"x": None}]}, {}])

    def _joined(self, calls: Sequence[tuple[str, str]]) -> str:
        space = self._chance.choice(["", " "])
        if self._template == "Gemma 4":
            return "".join(f"<|tool_call>{name}{arguments}<tool_call|>" for name, arguments in calls)
        key = "parameters" if self._template == "Llama 3" else "arguments"
        objects = [f'{{"name":{space}"{name}",{space}"{key}":{space}{arguments}}}' for name, arguments in calls]
        if self._template == "Mistral":
            return f"[TOOL_CALLS]{space}[{', '.join(objects)}]"
        if self._template == "Llama 3":
            return f";{space}".join(objects)
        line = self._chance.choice(["", "\n"])
        return "".join(f"{line}<tool_call>{line}{one}{line}</tool_call>" for one in objects)


class Generator:
    """Answers requests with random turns, and records each prompt and its answer."""

    def __init__(self, template: str, chance: random.Random) -> None:
        self.calls: list[tuple[tuple[int, ...], Completion]] = []
        end = END_OF_TURN.get("Qwen 3, thinking" if template == PARSED else template, "</s>")
        self._ends = bpe_tokenizer().convert_tokens_to_ids([end, end, end, "</s>"])
        self._chance = chance
        self._writer = Writer(template, chance)

    async def rollouts(self, request: RolloutRequest, on_group: Callable[[Group], object], *, timeout_s: float) -> None:
        (prompt,) = request.prompts
        ids = odd_ids(self._writer.turn(), self._chance)
        ended = self._chance.random() < 0.8
        ids = (*ids, self._chance.choice(self._ends)) if ended else ids or (5,)
        ended = ended and len(ids) <= request.sampling.max_tokens
        answer = self._stamped(ids[: request.sampling.max_tokens], "stop" if ended else "length")
        self.calls.append((prompt.token_ids, answer))
        on_group(Group(prompt_index=0, completions=(answer,)))

    def _stamped(self, ids: tuple[int, ...], reason: Any) -> Completion:
        turn, size = len(self.calls), len(ids)
        old = size if turn < SWITCHES_IN_TURN else self._chance.randint(0, size) if turn == SWITCHES_IN_TURN else 0
        sizes = {1: old, 2: size - old}
        return Completion(
            token_ids=ids,
            logprobs=tuple(-self._chance.randint(1, 4096) / 256 for _ in ids),  # exact in float32
            finish_reason=reason,
            versions=tuple(VersionSpan(version=Version(s, 1), tokens=tokens) for s, tokens in sizes.items() if tokens),
        )


class World:
    """An environment that answers calls and text with random text."""

    def reset(self, seed: int, **columns: Any) -> str:
        self._chance = random.Random(seed)
        return self._chance.choice(["", " Go."])

    def add(self, a: int, b: int) -> int:
        """Add.

        Args:
            a: a number
            b: a number
        """
        return a + b

    def look_up(self, text: str) -> str:
        """Look up.

        Args:
            text: what to look up
        """
        if self._chance.random() < 0.2:
            raise ValueError(text)
        return self._answer()

    async def step(self, message: Any) -> Any:
        return Done() if self._chance.random() < 0.1 else self._answer()

    def _answer(self) -> str:
        """A text that is not empty: `Go 3: ` is before it, so that two answers differ."""
        return f"Go {self._chance.randint(0, 9)}: {self._chance.choice(TEXTS)}"


class Plain:
    """The same for templates without tools."""

    def reset(self, seed: int, **columns: Any) -> str:
        self._world = World()
        return self._world.reset(seed)

    async def step(self, message: Any) -> Any:
        return await self._world.step(message)


def _has_tools(template: str) -> bool:
    return template in (*WITH_TOOLS, PARSED)


def _renderer(template: str) -> Renderer:
    return renderer("Qwen 3, thinking" if template == PARSED else template)


@cache
def _reader(template: str, schemas: str) -> TurnReader:
    parser = gemma_4_calls if template == "Gemma 4" else None
    tokenizer = copy.copy(bpe_tokenizer())
    tokenizer.response_template = RESPONSE_TEMPLATE if template == PARSED else None
    return TurnReader(tokenizer, _renderer(template), schemas=json.loads(schemas), tool_parser=parser)


def reader(template: str, schemas: Sequence[Schema]) -> TurnReader:
    return _reader(template, json.dumps(list(schemas)))


def sampler(generator: Generator) -> TurnSampler:
    return TurnSampler(generator, Sampling(max_tokens=1), seed=1, min_version=None, timeout_s=60)


async def environments(template: str) -> ClassEnvironments:
    made = ClassEnvironments(World if _has_tools(template) else Plain, timeout_s=60, max_characters=300)
    await made.start()
    return made


async def play(template: str, made: ClassEnvironments, seed: int, history: Any) -> tuple[Trajectory, Generator]:
    """Play one episode in an environment."""
    chance = random.Random(f"{template} {seed}")
    generator = Generator(template, chance)
    system = (
        [{"role": "system", "content": "Be brief."}] if template not in WITHOUT_SYSTEM and chance.random() < 0.3 else []
    )
    prompt = [*system, {"role": "user", "content": f"Q{seed} {chance.choice(TEXTS)}"}]
    player = Player(_renderer(template), reader(template, made.schemas), LIMITS, history)
    row = Row(prompt, columns={"seed": seed})
    group = await player.play_group(made, row, 0, [sampler(generator)], attempts=1)
    return group.trajectories[0], generator


class Forks:
    """An agent that continues any of its earlier conversations, and writes them down in its own way."""

    def __init__(self, template: str, seed: int, history: Any) -> None:
        self._template = template
        self._chance = random.Random(f"{template} {seed}")
        self.generator = Generator(template, self._chance)
        self._tools = [Tool.of(one).schema for one in (_add, _look_up)] if _has_tools(template) else []
        self._session = Session(
            _renderer(template),
            lambda schemas: reader(template, schemas),
            sampler(self.generator),
            LIMITS,
            plain_messages,
            history,
        )
        self._known: list[list[dict[str, Any]]] = [[{"role": "user", "content": f"Q{number}"}] for number in range(2)]

    async def play(self, calls: int) -> tuple[TokenSequence, ...]:
        """Make calls. Return what the learner trains on."""
        for number in range(calls):
            messages = self._chance.choice(self._known[-3:])
            answer = await self._session.ask(str(number), ChatCall(messages=messages, tools=self._tools or None))
            if self._chance.random() < 0.1:  # the client has gone
                self.generator.calls.pop()
                continue
            self._session.record(answer)
            message = answer.body("policy")["choices"][0]["message"]
            self._known.append([*messages, self._rewritten(message), *self._answers(message)])
        return self._session.recorder.sequences()

    def _rewritten(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        return {**message, "content": content.strip() if content and self._chance.random() < 0.3 else content}

    def _answers(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        said = f"Go {self._chance.randint(0, 9)}: {self._chance.choice(TEXTS)}"
        calls = message.get("tool_calls") or ()
        answers = [
            {"role": "tool", "tool_call_id": c["id"], "name": c["function"]["name"], "content": said} for c in calls
        ]
        return answers or [{"role": "user", "content": said}]


def _add(a: int, b: int) -> int:
    """Add.

    Args:
        a: a number
        b: a number
    """
    return a + b


def _look_up(text: str) -> str:
    """Look up.

    Args:
        text: what to look up
    """
    return text
