"""Stop strings of a TRL script: where a completion is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.models import make_tokenizer
from support.rollouts import completion
from tandem_protocol.config import ConfigError
from tandem_protocol.messages import Completion, VersionSpan
from tandem_protocol.version import Version
from tandem_trainer.trl.completions import sampling_options
from tandem_trainer.trl.stop_strings import StopStrings

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def cut(text: str, stop: Any, **options: Any) -> Completion:
    given = {"generation_kwargs": {"stop": stop, **options}}
    return StopStrings(given).cut(ids_of("12+"), completion(ids_of(text)), TOKENIZER)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("12=3=4", "=", "12="),
        ("12=3=4", ["4", "=3"], "12=3"),
        ("=12", "=", "="),
        ("1212", ["34", "21"], "121"),
        ("123", ["3"], "123"),
    ],
)
def test_the_token_that_completes_the_first_stop_string_is_the_last(text: str, stop: Any, expected: str) -> None:
    found = cut(text, stop)
    assert list(found.token_ids) == ids_of(expected)
    assert (len(found.logprobs), found.finish_reason) == (len(expected), "stop")


@pytest.mark.parametrize("stop", ["9", ["+1", "99"], [], None, "2+"])
def test_without_a_stop_string_the_completion_is_unchanged(stop: Any) -> None:
    given = completion(ids_of("123"))
    assert StopStrings({"stop": stop}).cut(ids_of("12+"), given, TOKENIZER) == given


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_it_is_the_shortest_beginning_that_has_a_stop_string(text: str, stops: list[str]) -> None:
    beginnings = [text[:count] for count in range(len(text) + 1)]
    expected = next((part for part in beginnings if any(stop in part for stop in stops)), text)
    assert list(cut(text, stops).token_ids) == ids_of(expected)


def test_versions_are_cut_as_the_tokens_are() -> None:
    spans = tuple(VersionSpan(version=Version(step, 1), tokens=2) for step in range(3))
    given = completion(ids_of("123=56")).model_copy(update={"versions": spans})
    for text, steps in (("3", [(0, 2), (1, 1)]), ("=", [(0, 2), (1, 2)]), ("6", [(0, 2), (1, 2), (2, 2)])):
        found = StopStrings({"stop": text}).cut((), given, TOKENIZER)
        assert [(span.version.step, span.tokens) for span in found.versions] == steps


def test_the_text_of_special_tokens_counts_only_if_vllm_would_show_it() -> None:
    given = completion([*ids_of("1"), EOS, *ids_of("2")])
    for skips, expected in ((True, 3), (False, 2)):
        stop = StopStrings({"stop": TOKENIZER.eos_token, "skip_special_tokens": skips})
        assert len(stop.cut(ids_of("1"), given, TOKENIZER).token_ids) == expected


def test_a_space_that_begins_the_completion_is_part_of_its_text() -> None:
    words = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()  # drops the space at the beginning, as that of Llama 2 does
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found = StopStrings({"stop": " b"}).cut([1], completion([2, 1]), fast)
    assert list(found.token_ids) == [2]


def test_a_character_of_several_tokens_is_found_when_it_is_complete() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("xé!")["input_ids"]
    assert len(ids) == 4
    assert list(StopStrings({"stop": "é"}).cut(fast("è")["input_ids"], completion(ids), fast).token_ids) == ids[:3]


@pytest.mark.parametrize("stop", [5, ["a", 5], [""], {"a": 1}])
def test_what_is_not_a_text_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match="expected a text or a list of texts"):
        StopStrings({"generation_kwargs": {"stop": stop}})


def test_a_rollout_is_requested_without_them() -> None:
    given = {"max_tokens": 8, "generation_kwargs": {"stop": ["a"], "include_stop_str_in_output": True}}
    _, sampling = sampling_options(given)
    assert sampling.max_tokens == 8
