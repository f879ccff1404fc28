"""Properties of `generator.mock.script`: the mock says what a table of turns says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.chatml import END, VOCAB, make_chatml_model, rendered, text, tokens
from support.generators import Generator, running
from tandem_generator.engines.mock import MockEngine, MockPolicy
from tandem_protocol.config import ConfigError
from tandem_protocol.config.generator import MockConfig
from tandem_protocol.errors import BadRequest
from tandem_protocol.messages import Completion, Prompt, RolloutLine, RolloutRequest, Sampling, VersionSpan
from tandem_protocol.version import BASE, Version

QUESTION = "What is 17 * 23?"
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 17, "b": 23}}\n</tool_call>'
ANSWER = "17 * 23 is 391."
ROW = {"prompt": QUESTION, "turns": [CALL, ANSWER]}
ASKED = rendered(("system", "Use the tools."), ("user", QUESTION))
AFTER_CALL = f"{ASKED}{CALL}<|im_end|>\n<|im_start|>tool\n391<|im_end|>\n<|im_start|>assistant\n"
AFTER_ANSWER = f"{AFTER_CALL}{ANSWER}<|im_end|>\n<|im_start|>user\nThank you.<|im_end|>\n<|im_start|>assistant\n"

Scripted = Callable[..., MockEngine]
"""Takes the rows of a script, and returns an engine with it."""


@pytest.fixture
def scripted(tmp_path: Path) -> Scripted:
    model = make_chatml_model(tmp_path / "model")

    def make(*rows: dict[str, Any], model: Path | str = model) -> MockEngine:
        path = tmp_path / "script.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return MockEngine(str(model), MockConfig(script=path), max_model_len=None)

    return make


async def sample(
    mock: MockEngine, prompt: str | Sequence[int], *, seed: int | None = 0, **sampling: Any
) -> list[Completion]:
    token_ids = tokens(prompt) if isinstance(prompt, str) else tuple(prompt)
    request = RolloutRequest(
        prompts=(Prompt(token_ids=token_ids, seed=seed),), sampling=Sampling(**({"max_tokens": 200} | sampling))
    )
    (group,) = [group async for group in mock.generate(request)]
    return list(group.completions)


async def said(mock: MockEngine, prompt: str, **sampling: Any) -> list[str]:
    """Return the text of each completion."""
    return [text(completion.token_ids) for completion in await sample(mock, prompt, **sampling)]


# -- which turn --------------------------------------------------------------------------------------------------------


async def test_a_conversation_gets_the_turns_of_its_row_in_order(scripted: Scripted) -> None:
    mock = scripted(ROW)
    assert await said(mock, ASKED) == [f"{CALL}<|im_end|>"]
    assert await said(mock, AFTER_CALL) == [f"{ANSWER}<|im_end|>"]


async def test_a_tool_call_is_sampled_with_the_models_special_tokens(scripted: Scripted) -> None:
    (call,) = await sample(scripted(ROW), ASKED)
    assert call.token_ids == (*tokens(CALL), END)
    assert (call.token_ids[0], call.token_ids[-2]) == (259, 260)
    assert call.finish_reason == "stop"


async def test_a_repeated_request_gets_the_same_turn_from_every_replica(scripted: Scripted) -> None:
    mock = scripted(ROW)
    first = await sample(mock, AFTER_CALL)
    assert await sample(mock, AFTER_CALL) == first
    assert await sample(scripted(ROW), AFTER_CALL) == first


async def test_a_turn_counts_as_given_only_behind_the_rows_text(scripted: Scripted) -> None:
    example = rendered(("user", "What is 2 * 2?"), ("assistant", CALL)).removesuffix("<|im_start|>assistant\n")
    assert await said(scripted(ROW), example + ASKED) == [f"{CALL}<|im_end|>"]


async def test_equal_turns_are_given_as_often_as_they_are_listed(scripted: Scripted) -> None:
    mock = scripted({"prompt": "Guess", "turns": ["7", "7", "8"]})
    prompt = rendered(("user", "Guess"))
    for expected in ("7", "7", "8"):
        assert await said(mock, prompt) == [f"{expected}<|im_end|>"]
        prompt += f"{expected}<|im_end|>\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"


async def test_the_first_row_that_has_a_turn_left_answers(scripted: Scripted) -> None:
    mock = scripted(ROW, {"prompt": "17", "turns": ["You are welcome."]}, {"turns": ["Hello."]})
    assert await said(mock, AFTER_CALL) == [f"{ANSWER}<|im_end|>"]
    assert await said(mock, AFTER_ANSWER) == ["You are welcome.<|im_end|>"]
    assert await said(mock, rendered(("user", "Good morning"))) == ["Hello.<|im_end|>"]


async def test_a_regex_matches_what_a_tool_answered(scripted: Scripted) -> None:
    mock = scripted({"regex": r"tool\n(391|392)<\|im_end\|>", "turns": [ANSWER]}, {"turns": [CALL]})
    assert await said(mock, ASKED) == [f"{CALL}<|im_end|>"]
    assert await said(mock, AFTER_CALL) == [f"{ANSWER}<|im_end|>"]


async def test_completions_take_the_samples_in_order(scripted: Scripted) -> None:
    mock = scripted({"samples": [["one"], ["two"], ["three"]]})
    words = [f"{word}<|im_end|>" for word in ("one", "two", "three", "one")]
    assert await said(mock, ASKED, n=4) == words
    assert await said(mock, ASKED, n=4, seed=None) == words
    assert await said(mock, ASKED, seed=4) == words[1:2], "completion i of seed s is completion 0 of seed s + i"


async def test_a_conversation_stays_with_the_sample_that_it_began_with(scripted: Scripted) -> None:
    mock = scripted({"prompt": QUESTION, "samples": [[CALL, ANSWER], ["390."], [CALL, "I do not know."]]})
    assert await said(mock, AFTER_CALL, n=3) == [
        f"{words}<|im_end|>" for words in (ANSWER, "I do not know.", ANSWER)
    ], "only the samples that begin with the call go on after it"
    wrong = f"{ASKED}390.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(BadRequest, match="all turns of row 1 are in it already"):
        await said(mock, wrong)


async def test_a_random_row_leaves_the_prompt_to_the_mocks_own_policy(scripted: Scripted) -> None:
    mock = scripted(ROW, {"turns": "random"})
    own = MockEngine("none", MockConfig(vocab_size=VOCAB), max_model_len=None)
    own._policy.eos_token_id = 256
    other = rendered(("user", "What is 2 * 2?"))
    assert await sample(mock, other, n=3) == await sample(own, other, n=3)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (rendered(("user", "What is 2 * 2?")), ["What is 2 * 2?", "no row is for it"]),
        (AFTER_ANSWER, ["all turns of row 1 are in it already"]),
    ],
    ids=["no row", "no turn"],
)
async def test_a_prompt_without_a_turn_is_refused(scripted: Scripted, prompt: str, words: list[str]) -> None:
    with pytest.raises(BadRequest) as refused:
        await said(scripted(ROW), prompt)
    for word in [*words, '{"turns": "random"}']:
        assert word in str(refused.value)


# -- tokens and logprobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
async def test_a_scripted_token_has_the_logprob_of_the_candidate_that_it_replaces(
    scripted: Scripted, filters: dict[str, Any]
) -> None:
    policy = MockPolicy(VOCAB, 256)
    mock = scripted(ROW)
    await mock.load_weights(Version(3, 1), ())
    (call,) = await sample(mock, ASKED, **filters)
    sampling = Sampling(max_tokens=1, **filters)
    allowed = []
    context = list(tokens(ASKED))
    for token, logprob in zip(call.token_ids, call.logprobs, strict=True):
        _, probabilities = policy.distribution(policy.context(context), Version(3, 1), sampling)
        allowed.append(any(math.exp(logprob) == pytest.approx(p) for p in probabilities if p))
        context.append(token)
    assert all(allowed)
    kinds = {1.0: 4, 0.5: 3, 0.0: 1}[filters.get("temperature", 1.0)] if "top_k" not in filters else 3
    assert len(set(call.logprobs)) >= kinds, "logprobs differ from token to token, so a test finds a shift by one"


async def test_logprobs_depend_on_the_seed_and_the_version_and_the_text_does_not(scripted: Scripted) -> None:
    mock = scripted(ROW)
    (first,) = await sample(mock, ASKED)
    (other,) = await sample(mock, ASKED, seed=1)
    assert other.token_ids == first.token_ids
    assert other.logprobs != first.logprobs
    assert first.versions == (VersionSpan(version=BASE, tokens=len(first.token_ids)),)


async def test_max_tokens_cuts_a_turn(scripted: Scripted) -> None:
    (cut,) = await sample(scripted(ROW), ASKED, max_tokens=5)
    assert (cut.token_ids, cut.finish_reason) == (tokens(CALL)[:5], "length")


async def test_a_stop_token_of_the_request_ends_a_turn(scripted: Scripted) -> None:
    (cut,) = await sample(scripted(ROW), ASKED, stop_token_ids=[tokens("}")[0]])
    assert (text(cut.token_ids)[-3:], cut.finish_reason) == ("23}", "stop")


async def test_behind_a_turn_ignore_eos_goes_on_with_the_mocks_own_tokens(scripted: Scripted) -> None:
    (long,) = await sample(scripted(ROW), ASKED, ignore_eos=True, max_tokens=150)
    assert long.token_ids[: len(tokens(CALL)) + 1] == (*tokens(CALL), END)
    assert (len(long.token_ids), long.finish_reason) == (150, "length")


async def test_without_a_tokenizer_rows_are_token_ids(scripted: Scripted) -> None:
    mock = scripted({"prompt": [5, 6], "turns": [[10, 11], [12, 0]]}, {"turns": [[99]]}, model="mock")
    prompt = [1, 5, 6, 2]
    assert [c.token_ids for c in await sample(mock, prompt)] == [(10, 11, 0)]
    assert [c.token_ids for c in await sample(mock, [*prompt, 10, 11, 0, 2])] == [(12, 0)]
    assert [c.token_ids for c in await sample(mock, [5, 2, 6])] == [(99, 0)]


async def test_with_a_tokenizer_a_row_may_be_token_ids_too(scripted: Scripted) -> None:
    mock = scripted({"prompt": list(tokens(QUESTION)), "turns": [list(tokens(CALL)), ANSWER]})
    assert await said(mock, AFTER_CALL) == [f"{ANSWER}<|im_end|>"]


END_FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    "tokenizer_config": ({}, "a", "a<|im_end|>"),
    "written as an object": ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, "a", "a<|im_end|>"),
    "config.json alone": ({"tokenizer_config": {}}, "a", "a<|endoftext|>"),
    "in the turn": ({}, "a<|endoftext|>", "a<|endoftext|>"),
    "of generation_config": (
        {"tokenizer_config": {"eos_token": "<|endoftext|>"}, "generation_config": {"eos_token_id": [256, END]}},
        "a<|im_end|>",
        "a<|im_end|>",
    ),
}


@pytest.mark.parametrize(("files", "turn", "expected"), END_FILES.values(), ids=END_FILES.keys())
async def test_a_turn_ends_with_one_token_that_ends_turns(
    scripted: Scripted, tmp_path: Path, files: dict[str, Any], turn: str, expected: str
) -> None:
    model = make_chatml_model(tmp_path / "other", **files)
    (completion,) = await sample(scripted({"turns": [turn]}, model=model), ASKED)
    assert (text(completion.token_ids), completion.finish_reason) == (expected, "stop")


async def test_a_turn_that_writes_its_own_end_is_found_in_the_conversation(scripted: Scripted) -> None:
    mock = scripted({"turns": ["one<|endoftext|>", "two"]})
    assert await said(mock, ASKED) == ["one<|endoftext|>"]
    assert await said(mock, f"{ASKED}one<|endoftext|>\n<|im_start|>assistant\n") == ["two<|im_end|>"]


# -- the file ----------------------------------------------------------------------------------------------------------


async def test_yaml_and_jsonl_say_the_same(tmp_path: Path) -> None:
    model = make_chatml_model(tmp_path / "model")
    (tmp_path / "script.yaml").write_text(
        "- prompt: What is 17 * 23?\n"
        "  turns:\n"
        "    - |-\n"
        "      <tool_call>\n"
        '      {"name": "multiply", "arguments": {"a": 17, "b": 23}}\n'
        "      </tool_call>\n"
        "    - 17 * 23 is 391.\n"
        "- turns: random\n"
    )
    mock = MockEngine(str(model), MockConfig(script=tmp_path / "script.yaml"), max_model_len=None)
    assert await said(mock, ASKED) == [f"{CALL}<|im_end|>"]
    assert await said(mock, AFTER_CALL) == [f"{ANSWER}<|im_end|>"]


BAD_FILES: dict[str, tuple[str, str, str]] = {
    "other ending": ("script.txt", "", "script.txt, expected a file whose name ends in .jsonl or .yaml"),
    "no rows": ("script.jsonl", "\n\n", "script.jsonl has no rows, expected at least one"),
    "no JSON": ("script.jsonl", '{"turns": ["a"]}\n{"turns"\n', "line 2: got '{\"turns\"', expected JSON"),
    "no object": ("script.jsonl", "[1]\n", "row 1: got [1]; "),
    "no turns": ("script.jsonl", '{"prompt": "a"}\n', "row 1: got neither turns nor samples, expected one of them"),
    "empty turns": ("script.jsonl", '{"turns": []}\n', "row 1: turns"),
    "both": ("script.jsonl", '{"turns": ["a"], "samples": [["b"]]}\n', "got both turns and samples"),
    "two matches": ("script.jsonl", '{"prompt": "a", "regex": "b", "turns": ["a"]}\n', "got both prompt and regex"),
    "bad regex": ("script.jsonl", '{"regex": "(", "turns": ["a"]}\n', "row 1: regex: got '(', expected a regular"),
    "unknown key": ("script.jsonl", '{"turn": ["a"]}\n', "row 1: turn: got ['a']; Extra inputs are not permitted"),
    "number for text": ("script.jsonl", '{"turns": [391]}\n', "row 1: turns"),
    "YAML number": ("script.yaml", "- turns: [391]\n", "got 391 without quotes, which YAML reads as a number"),
    "YAML mapping": ("script.yaml", "prompt: a\n", "expected a list of rows"),
    "YAML double key": ("script.yaml", "- turns: [a]\n  turns: [b]\n", "got the key turns on line 1 and again"),
    "no such token": ("script.jsonl", '{"turns": [[5, 9999]]}\n', "got token id 9999, expected ids below"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    model = make_chatml_model(tmp_path / "model")
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as refused:
        MockEngine(str(model), MockConfig(script=tmp_path / name), max_model_len=None)
    assert words in str(refused.value)


def test_a_file_that_does_not_exist_is_refused_at_the_start(tmp_path: Path) -> None:
    for name in ("script.jsonl", "script.yaml"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read: No such file or directory"):
            MockEngine("mock", MockConfig(script=tmp_path / name), max_model_len=None)


@pytest.mark.parametrize(
    "row", [{"turns": ["text"]}, {"prompt": "text", "turns": [[1]]}, {"regex": "t", "turns": [[1]]}]
)
def test_text_needs_a_tokenizer(scripted: Scripted, row: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"row 1: got the text 't(ext)?', but shared\.model is not a folder with a token"
    ):
        scripted(row, model="mock")


def test_text_that_the_tokenizer_cannot_write_is_refused(scripted: Scripted, tmp_path: Path) -> None:
    from support.models import make_tokenizer

    model = make_chatml_model(tmp_path / "letters")
    make_tokenizer(80).save_pretrained(model)
    with pytest.raises(ConfigError, match=r"row 1: the model's tokenizer turns '\{a\}' into "):
        scripted({"turns": ["{a}"]}, model=model)


# -- the service -------------------------------------------------------------------------------------------------------


def test_the_service_reads_the_script_of_its_settings(tmp_path: Path) -> None:
    model = make_chatml_model(tmp_path / "model")
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps(ROW))
    option = ("--generator.mock.script", str(script))
    with running("mock", model, tmp_path / "weights", *option, log=tmp_path / "log") as generator:
        (group,) = generator.rollouts(Prompt(token_ids=tokens(ASKED)), n=2, max_tokens=100)
        assert [text(completion.token_ids) for completion in group.completions] == [f"{CALL}<|im_end|>"] * 2
        body = {"prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 5}}
        line = RolloutLine.model_validate_json(generator.client.post("/rollouts", json=body).text)
        assert line.error is not None
        assert (line.error.code, line.error.retryable) == ("bad_request", False)


def test_the_service_ends_with_a_message_if_the_script_cannot_be_used(tmp_path: Path) -> None:
    option = ("--generator.mock.script", str(tmp_path / "none.jsonl"))
    generator = Generator("mock", "mock", tmp_path / "weights", *option, log=tmp_path / "log")
    assert generator.process.wait(60) == 2
    log = (tmp_path / "log").read_text()
    assert "generator.mock.script: " in log
    assert "Traceback" not in log
    assert "shared.model" not in log
