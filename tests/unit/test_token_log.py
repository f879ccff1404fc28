"""`rollouts.jsonl` has the sampled tokens with the logprobs of sampler and trainer, bounded in size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored, sequence, single_turn, trajectory
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_rollout.trajectory import Group, Trajectory
from tandem_trainer import algorithms
from tandem_trainer.batch import pad, rows_of
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.trained_tokens import TrainedTokens
from tandem_trainer.run.metrics import trajectory_records
from tandem_trainer.run.token_log import TEXT_LENGTH, TokenLog, TokenTexts

TEXTS = TokenTexts(make_tokenizer())
BYTES = list(range(256))
GPT2 = dict(enumerate([*range(33, 127), *range(161, 173), *range(174, 256)]))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, as those of Qwen and Llama 3 have for rare characters."""
    signs = {byte: chr(byte) for byte in GPT2.values()}
    for number, byte in enumerate(byte for byte in BYTES if byte not in signs):
        signs[byte] = chr(256 + number)
    tokenizer = Tokenizer(models.BPE({signs[byte]: byte for byte in BYTES}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that drops the space in front of a text, as those of Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "▁": 3}, unk_token="c"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_TEXTS = TokenTexts(byte_tokenizer())


@given(st.text())
def test_the_texts_of_tokens_that_split_characters_are_the_text(text: str) -> None:
    data = text.encode(errors="replace")
    texts = BYTE_TEXTS(list(data))
    assert len(texts) == len(data)
    assert "".join(texts) == data.decode()


def test_the_last_token_of_a_character_has_it() -> None:
    assert BYTE_TEXTS(list("aé😀".encode())) == ["a", "", "é", "", "", "", "😀"]
    assert BYTE_TEXTS(list("é".encode()[:1])) == ["�"]
    assert len(BYTE_TEXTS([0x80] * 20 + [65])) == 21


def test_a_token_behind_an_incomplete_character_keeps_its_text() -> None:
    assert BYTE_TEXTS([*"😀".encode()[:2], *b"abc"]) == ["", "", "�a", "b", "c"]
    assert BYTE_TEXTS([0, 27, 0xFF, 10]) == ["\0", "\x1b", "", "�\n"]


class OddTexts(TokenTexts):
    """A tokenizer whose tokens are all as long as a page."""

    def __init__(self, sign: str) -> None:
        self._text = sign * 10_000

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        return [self._text] * len(token_ids)


@pytest.mark.parametrize("sign", ["a", "\0", "😀", "\ud800"])
def test_the_size_of_a_line_is_bounded_for_any_tokens(sign: str) -> None:
    (span,) = of(single_turn([4], completion([5] * 2048)), texts=OddTexts(sign), limit=2048)["spans"]
    assert {len(text) for text in span["text"]} == {TEXT_LENGTH}
    assert span["text"][0].endswith("…")
    assert len(json.dumps(span)) < 3_300_000


def test_spaces_between_words_are_kept() -> None:
    assert TokenTexts(spaced_tokenizer())([0, 1, 2, 3, 0]) == [" a", " b", "c", " ", " a"]


def of(one: Trajectory, **given: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"texts": TEXTS, "limit": 100} | given
    return TokenLog(**settings).fields(one)


def test_a_span_has_the_texts_the_rounded_logprobs_and_the_versions() -> None:
    sampled = Completion(
        token_ids=(5, 6, 7),
        logprobs=(-0.123456, -1e-9, -2.0),
        finish_reason="stop",
        versions=(VersionSpan(version=Version(1, 1), tokens=1), VersionSpan(version=Version(2, 1), tokens=2)),
    )
    assert of(single_turn([4], sampled))["spans"] == [
        {
            "message": None,
            "text": ["2", "3", "4"],
            "sampler": [-0.1235, 0.0, -2.0],
            "trainer": None,
            "versions": [["1.1", 1], ["2.1", 2]],
        }
    ]


def episode(*said: str) -> Trajectory:
    """Two turns in one sequence, "2" and "45", and one in another, "3"."""
    messages = ({"role": "user", "content": "2"}, *({"role": "assistant", "content": text} for text in said))
    return trajectory(
        [sequence([([4], [5]), ([6], [7, 8])]), sequence([([4], [6])], version=Version(2, 1))],
        1.0, messages=messages, num_prompt_messages=1, turns=3,
    )  # fmt: skip


def test_a_span_names_its_message_also_if_the_turns_of_sequences_alternate() -> None:
    def messages(*said: str) -> list[int | None]:
        return [span["message"] for span in of(episode(*said))["spans"]]

    assert messages("2", "45", "3") == [1, 2, 3]
    assert messages("2", "3", "45") == [1, 3, 2]
    assert messages("9", "45", "3") == [None, 2, 3]


def test_at_most_the_limit_of_tokens_is_logged_over_all_turns() -> None:
    spans = of(episode("2", "45", "3"), limit=2)["spans"]
    assert [(span["text"], span["versions"]) for span in spans] == [(["2"], [["0.1", 1]]), (["4"], [["0.1", 1]])]
    assert [len(span["sampler"]) for span in spans] == [1, 1]
    assert of(episode("2", "45", "3"), limit=0)["spans"] == []
    assert of(episode("2", "45", "3"), texts=None)["spans"] == []


def test_a_token_takes_about_30_bytes() -> None:
    group = scored([4], [completion([5] * 2048)], [1.0])
    batch = pad(rows_of(group.trajectories[0], 1.0), trajectory_total=1, token_total=1)
    trained = TrainedTokens(batch, [batch], [torch.full_like(batch.sampler_logprobs_BT, -12.34567)])
    (record,) = trajectory_records(Version(3, 1), [group], 1, tokens=TokenLog(TEXTS, 2048, trained))
    assert len(record["spans"][0]["trainer"]) == 2048
    assert len(json.dumps(record["spans"])) < 32 * 2048


def test_a_trajectory_that_does_not_count_in_the_loss_has_no_advantage() -> None:
    one, other = (single_turn([4], completion([5, 6])) for _ in range(2))
    batch = pad([*rows_of(one, 1.0, in_loss=False), *rows_of(other, 2.0)], trajectory_total=1, token_total=1)
    trained = TrainedTokens(batch, [batch], [batch.sampler_logprobs_BT])
    assert [trained.advantage(one), trained.advantage(other)] == [0.0, 2.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def learned(model: Path, groups: list[Group], **options: Any) -> tuple[Learner, list[dict[str, Any]]]:
    """Make one update. Returns the learner, and the lines of all trajectories."""
    config = TrainerConfig.model_validate({"max_steps": 9, "rewards": [{"function": "rewards:r"}]} | options)
    algorithm = algorithms.build(config)
    accelerator = Accelerator(cpu=True)
    learner = Learner(
        SharedConfig(model=str(model)), config, make_tokenizer(), accelerator, needs_reference=algorithm.needs_reference
    )
    learner.update(algorithm.make_batch(groups, list), algorithm)
    tokens = TokenLog(TEXTS, 100, learner.trained)
    return learner, trajectory_records(Version(1, 1), groups, 99, tokens=tokens)


LEARNED = [
    scored([4, 5], [completion([6, 7, 8, 9, 10]), completion([6])], [1.0, 0.0]),
    scored([5], [completion([9, 2]), completion([9, 2])], [0.0, 0.5], row=1),
    scored([5], [completion([9, 2]), completion([9, 2])], [0.5, 0.5], row=2),
]


def test_the_trainers_logprobs_and_the_advantages_are_those_of_the_same_trajectory(model: Path) -> None:
    """Micro-batches of few tokens put rows into another order; equal completions differ in their advantages."""
    _, small = learned(model, LEARNED, learner={"max_tokens_per_micro_batch": 8}, optim={"learning_rate": 1.0})
    by_row = {(line["row"], line["reward"]): line for line in small}
    advantages = {key: line["advantage"] for key, line in by_row.items()}
    assert advantages[0, 1.0] == pytest.approx(-advantages[0, 0.0]) == pytest.approx(0.7070, abs=1e-4)
    assert advantages[1, 0.5] > 0 > advantages[1, 0.0]
    assert advantages[2, 0.5] == 0
    assert [span["trainer"] for span in by_row[2, 0.5]["spans"]] == [None], "nothing was learned from it"
    for one, line in zip([group.trajectories[0] for group in LEARNED[:2]], small, strict=False):
        assert_computed_by_the_model(model, one, line)


def assert_computed_by_the_model(model: Path, one: Trajectory, line: dict[str, Any]) -> None:
    """The trainer's logprobs are those that the untrained model itself gives the tokens of each span."""
    untrained = AutoModelForCausalLM.from_pretrained(model)
    expected = []
    for own in one.sequences:
        tokens_S = torch.tensor(own.token_ids)
        logprobs_SV = untrained(tokens_S[None]).logits[0].log_softmax(-1)
        expected += [
            logprobs_SV[range(span.start - 1, span.end - 1), tokens_S[span.start : span.end]].tolist()
            for span in own.sampled
        ]
    assert [span["trainer"] for span in line["spans"]] == [pytest.approx(each, abs=2e-4) for each in expected]


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_trainers_logprobs_are_from_before_the_first_optimizer_step(model: Path, iterations: int) -> None:
    _, lines = learned(model, LEARNED, grpo={"num_iterations": iterations}, optim={"learning_rate": 1.0})
    _, untouched = learned(model, LEARNED, optim={"learning_rate": 1e-12})
    assert [line["spans"] for line in lines] == [line["spans"] for line in untouched]


def test_all_turns_of_an_episode_have_the_trainers_logprobs_of_their_tokens(model: Path) -> None:
    won, lost = episode("2", "45", "3"), episode("2", "45", "3").model_copy(update={"reward": 0.0})
    _, lines = learned(model, [Group(row=0, trajectories=(won, lost))], optim={"learning_rate": 1.0})
    assert [len(span["trainer"]) for span in lines[0]["spans"]] == [1, 2, 1]
    for one, line in zip((won, lost), lines, strict=True):
        assert_computed_by_the_model(model, one, line)


def test_of_a_pair_the_preferred_completion_has_the_advantage_1(model: Path) -> None:
    _, lines = learned(model, LEARNED, algorithm="online_dpo", rollout={"num_generations": 2})
    assert [(line["row"], line["reward"], line["advantage"]) for line in lines] == [
        (0, 1.0, 1.0), (1, 0.0, -1.0), (2, 0.5, 0.0), (0, 0.0, -1.0), (1, 0.5, 1.0), (2, 0.5, 0.0),
    ]  # fmt: skip
