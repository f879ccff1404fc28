"""Every model family in both transformers and vLLM is trained with the right probabilities, or refused.

`docs/reference/architectures.json` holds the expected outcomes; `tests/golden/record_architectures.py` writes it. Some
families have a second row, for the other value of `tie_word_embeddings`. The usual families are always tested, and all
rows with `TANDEM_THOROUGH=1`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from support.family_pool import RESULTS, judged
from support.thorough import THOROUGH

pytestmark = [pytest.mark.vllm, pytest.mark.alone]

EXPECTED: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
USUAL = (
    "llama", "llama, tied", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma2", "gemma3_text",
    "starcoder2", "gpt_neox", "gpt_neox, tied", "opt", "falcon", "bloom", "gpt2", "qwen3_moe", "qwen3_moe, tied",
    "mixtral", "mixtral, tied", "gpt_oss", "mamba2", "deepseek_v2", "deepseek_v3", "qwen3_next", "llama4_text",
    "apertus",
)  # fmt: skip
"""The most used families, mixtures of experts, a state space model, and families that are refused or alerted."""
TOLERANCE = 1e-3
"""Bound of the largest |generator logprob − trainer logprob|, in nats, in float32."""
ROUGHER = {"gemma2": 5e-3, "vaultgemma": 5e-3}  # vLLM's CPU attention approximates the tanh that caps the scores
DIFFERS = "Trainer and generators differ by"
"""The start of the mismatch warning. It is an error above `trainer.max_mismatch`, and some families are near it."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    with judged([*EXPECTED] if THOROUGH else USUAL, tmp_path_factory.mktemp("architectures")) as outcomes:
        yield outcomes


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in USUAL else pytest.mark.thorough) for family in EXPECTED],
)
def test_a_family_is_trained_with_the_right_probabilities_or_refused_with_the_reason(
    family: str, outcomes: dict[str, Future[dict[str, Any]]]
) -> None:
    got, expected = outcomes[family].result(), EXPECTED[family]
    assert got["reason"] == expected["reason"]
    assert got["outcome"] == expected["outcome"] or got["reason"].startswith(DIFFERS)
    if got["outcome"] == "trained":
        tolerance = ROUGHER.get(family.partition(", ")[0], TOLERANCE)
        assert got["before"] <= tolerance
        assert got["after"] <= tolerance
        assert got["moved"] >= 20 * tolerance, "the update must be large enough to show weights that did not arrive"
