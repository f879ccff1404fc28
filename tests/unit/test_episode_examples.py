"""The examples of episodes: their data, their tools and environments, and that their models can take part."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tandem_rollout.chat_template import render
from tandem_rollout.environments import Done
from tandem_rollout.rendering import Renderer, check_template
from tandem_rollout.tools import Tool
from tandem_rollout.turns import TurnReader

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"calculator": (8000, 256), "game": (180, 60), "agent": (3436, 128)}
"""Example → prompts for training and for the evaluation."""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of an example, as the trainer does from the project's folder."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def module(example: str, name: str) -> ModuleType:
        monkeypatch.syspath_prepend(EXAMPLES / example)
        spec = importlib.util.spec_from_file_location(f"{example}_{name}", EXAMPLES / example / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    yield module
    for name in {"tools", "game", "agent"} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.parametrize("example", SIZES)
def test_prompts_are_reproducible_and_held_out_prompts_are_separate(load: Any, example: str) -> None:
    Path("model").mkdir()
    Path("model/model.safetensors").touch()
    prepare = load(example, "prepare")
    prepare.main()
    train, held_out = (Path(name).read_text().splitlines() for name in ("prompts.jsonl", "held_out.jsonl"))
    prepare.main()
    assert Path("prompts.jsonl").read_text().splitlines() == train
    assert (len(train), len(held_out)) == SIZES[example]
    assert not set(train) & set(held_out)


def test_the_calculator_computes_and_says_what_it_expects(load: Any) -> None:
    calculate = Tool.of(load("calculator", "tools").calculate).function
    assert [calculate(expression=one) for one in ("47 * 86", "12+30", " 5 - 99 ")] == [4042, 42, -94]
    for wrong in ("2 ** 9", "__import__('os')", "", "1 + 2 + 3", "9999999 * 2", "2 * 9999999"):
        with pytest.raises(ValueError, match="expected an expression such as"):
            calculate(expression=wrong)


def test_the_calculator_rewards_only_the_right_last_message(load: Any) -> None:
    reward = load("calculator", "rewards").exact_match
    result = {"role": "tool", "content": "42"}
    said = {"role": "assistant", "content": "42"}
    episodes = [[result, said], [said], [said, result], [{**said, "content": "420"}]]
    assert reward(completions=episodes, answer=["42"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_whoever_follows_the_hints_of_the_game_finds_the_treasure(load: Any) -> None:
    module = load("game", "game")
    opposite = {"north": "south", "south": "north", "west": "east", "east": "west"}

    def play(start: list[int], treasure: list[int], move: Any) -> float | None:
        game = module.Treasure()
        hint = game.reset(start=start, treasure=treasure)
        for _ in range(6):
            direction = hint.removeprefix(" It is ").removesuffix(".")
            hint = asyncio.run(game.step({"role": "assistant", "content": move(direction)}))
            if isinstance(hint, Done):
                return hint.reward
        raise AssertionError("the game does not end")

    places = [[row, column] for row in range(4) for column in range(4)]
    games = [(start, treasure) for start in places for treasure in places if start != treasure]
    assert {play(*one, lambda direction: direction) for one in games} == {1.0}
    assert {play(*one, lambda direction: opposite[direction]) for one in games} == {0.0}
    assert {play(*one, lambda direction: "wait") for one in games} == {0.0}
    first_only = iter(["east", "wait"])
    assert play([0, 0], [0, 2], lambda direction: next(first_only)) == 0.5


@pytest.mark.parametrize("example", ["calculator", "agent"])
def test_the_chat_template_shows_tools_and_calls_that_the_trainer_can_read(load: Any, example: str) -> None:
    prepare = load(example, "prepare")
    tokenizer = prepare.make_tokenizer()
    renderer = Renderer(tokenizer, lambda messages, tools: render("a row", messages, tools, tokenizer, {}).text)
    schemas = [Tool.of(load("calculator", "tools").calculate).schema]
    check_template(renderer, schemas, answers_in_text=False)
    call = {"name": "calculate", "arguments": {"expression": "47 * 86"}}
    token_ids = renderer.tokens(f"<tool_call>{json.dumps(call)}</tool_call><end>")
    turn = TurnReader(tokenizer, renderer, schemas=schemas).read(token_ids, schemas=schemas)
    assert [dict(one._asdict()) for one in turn.calls] == [call]
    assert "calculate(expression)" in renderer.text([{"role": "user", "content": "Hi."}], schemas)


def test_the_chat_template_of_the_game_shows_what_the_environment_says(load: Any) -> None:
    tokenizer = load("game", "prepare").make_tokenizer()
    renderer = Renderer(tokenizer, lambda messages, tools: render("a row", messages, tools, tokenizer, {}).text)
    check_template(renderer, [], answers_in_text=True)
    assert renderer.decoded(renderer.tokens("<user> It is north.<end>")) == "<user> It is north.<end>"
