"""Position encodings do not depend on other rows of a batch, and equal those that vLLM chooses by max_model_len."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from support.architectures import HEAD_DIM, VOCAB, tiny_config, tiny_model
from tandem_rollout.errors import UserError
from tandem_trainer.learner.logprobs import TokenLogprobs
from tandem_trainer.learner.positions import fix_positions

ORIGINAL = 64
SHORT = [1.0 + 0.1 * index for index in range(HEAD_DIM // 2)]
LONG = [1.0 + 0.7 * index for index in range(HEAD_DIM // 2)]
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL},
}  # fmt: skip
FAMILIES = ("llama", "phi3", "gemma3_text")  # the last has one encoding per layer type
PHI3_TYPES = ("default", "longrope")
PAIRS = [(family, rope) for family in FAMILIES for rope in SCALED if family != "phi3" or rope in PHI3_TYPES]


def _config(family: str, rope_type: str, **changes: Any) -> PreTrainedConfig:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALED[rope_type], **changes}
    kinds = {"sliding_attention": rope, "full_attention": rope}
    config = tiny_config(family, rope_parameters=kinds if family == "gemma3_text" else rope)
    if rope_type == "dynamic":
        config.max_position_embeddings = ORIGINAL
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = ORIGINAL
    return config


def _logprobs(model: torch.nn.Module, *lengths: int) -> Tensor:
    """Logprobs of the first row of a batch with rows of these lengths: [T]."""
    rows = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    policy = TokenLogprobs(model.eval(), temperature=1.0, chunk_size=1000)
    token_ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    completion_mask_BT = torch.arange(token_ids_BS.shape[1] - 1) < (torch.tensor(lengths) - 1)[:, None]
    with torch.no_grad():
        logprobs_BT, _ = policy(token_ids_BS, torch.ones(len(rows), dtype=torch.long), completion_mask_BT)
    return logprobs_BT[0, : lengths[0] - 1]


@pytest.mark.parametrize(("family", "rope_type"), PAIRS)
@pytest.mark.parametrize("max_model_len", [ORIGINAL, 200])
def test_logprobs_of_a_row_do_not_depend_on_the_lengths_of_other_rows(
    family: str, rope_type: str, max_model_len: int
) -> None:
    model = tiny_model(_config(family, rope_type))
    longest = fix_positions(model, [max_model_len])
    assert longest == (ORIGINAL if rope_type == "dynamic" else max_model_len)
    for length in (40, longest):
        torch.testing.assert_close(_logprobs(model, 40, length), _logprobs(model, 40), atol=1e-4, rtol=0)
    # Earlier batches do not influence later ones.
    torch.testing.assert_close(_logprobs(model, longest, 40), _logprobs(model, longest), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("max_model_len", "factor"), [(ORIGINAL, SHORT), (ORIGINAL + 1, LONG)])
def test_longrope_has_the_factors_that_vllm_chooses_by_max_model_len(
    family: str, max_model_len: int, factor: list[float]
) -> None:
    model = tiny_model(_config(family, "longrope"))
    fix_positions(model, [max_model_len])
    only = tiny_model(_config(family, "longrope", short_factor=factor, long_factor=factor))
    only.load_state_dict(model.state_dict())
    torch.testing.assert_close(_logprobs(model, 40), _logprobs(only, 40), atol=1e-5, rtol=0)
    other = tiny_model(_config(family, "longrope"))
    fix_positions(other, [ORIGINAL + 1 if max_model_len == ORIGINAL else ORIGINAL])
    other.load_state_dict(model.state_dict())
    assert (_logprobs(model, 40) - _logprobs(other, 40)).abs().max() > 0.1, "the two factors must differ"


def test_longrope_uses_mscale_as_vllm_does() -> None:
    model = tiny_model(_config("phi3", "longrope", short_mscale=1.5, long_mscale=2.5))
    fix_positions(model, [ORIGINAL])
    assert model.model.rotary_emb.attention_scaling == 1.5
    model = tiny_model(_config("phi3", "longrope", short_mscale=1.5, long_mscale=2.5))
    fix_positions(model, [ORIGINAL + 1])
    assert model.model.rotary_emb.attention_scaling == 2.5


def test_generators_with_different_encodings_are_refused() -> None:
    model = tiny_model(_config("phi3", "longrope"))
    with pytest.raises(UserError, match=r"max_model_len 64, 128, expected all above 64 or none"):
        fix_positions(model, [128, 64])
    assert fix_positions(model, [128, 256]) == 128
    assert fix_positions(tiny_model(_config("llama", "llama3")), [128, 64]) == 64


def test_rows_are_limited_to_a_sliding_window_that_differs_in_vllm() -> None:
    assert fix_positions(tiny_model(tiny_config("cohere2", sliding_window=16)), [128]) == 16
    assert fix_positions(tiny_model(tiny_config("gemma3_text", sliding_window=16)), [128]) == 128
