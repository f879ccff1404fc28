"""An update that computes a group's prompt once equals one that computes it with each completion."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate

from support.architectures import tiny_config, tiny_model
from support.models import make_tiny_model, make_tokenizer
from support.rollouts import completion, scored, sequence, trajectory
from tandem_protocol.config import SharedConfig
from tandem_protocol.config.learning import LearnerConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group
from tandem_trainer.algorithms.grpo import Grpo
from tandem_trainer.algorithms.online_dpo import OnlineDpo
from tandem_trainer.batch import Batch, pad, rows_of
from tandem_trainer.learner import packed_prompts, shared_prompts
from tandem_trainer.learner.learner import Learner
from tandem_trainer.learner.logprobs import TokenLogprobs
from tandem_trainer.learner.model import checkpoint_gradients
from tandem_trainer.learner.prompt_cache import PromptCache
from tandem_trainer.learner.shared_prompts import difference_when_shared, why_unshared
from tandem_trainer.micro_batches import PackedPrompts

WINDOW = 16
"""Sliding window of the tiny models that have one."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gpt_neox": {}, "phi3": {}, "falcon": {"alibi": True}, "bloom": {},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0}, "gpt2": {}, "qwen3_moe": {"sliding_window": None},
    "gemma3_text": {}, "mistral": {},
}  # fmt: skip
PACKABLE = tuple(name for name in ARCHITECTURES if name not in ("falcon", "bloom"))
"""Those whose attention has no bias by column (ALiBi)."""
FREE = PackedPrompts(pair_cost=0.0)
GROUPS = {40: [25, 3, 40, 11], 30: [1, 30, 7, 7], 6: [5, 2, 45, 9]}
"""Length of a prompt → those of its completions. Prompts and rows are shorter and longer than a window."""


def _tokens(size: int, seed: int) -> list[int]:
    return torch.randint(3, 64, (size,), generator=torch.Generator().manual_seed(seed)).tolist()


def _groups() -> list[Group]:
    return [
        scored(
            _tokens(prompt, prompt),
            [completion(_tokens(size, prompt + number)) for number, size in enumerate(sizes, 1)],
            [(number * 0.7) % 1.1 for number in range(len(sizes))],
        )
        for prompt, sizes in GROUPS.items()
    ]


class _Update(NamedTuple):
    loss: float
    logprobs_BT: Tensor
    entropy_BT: Tensor
    gradients: dict[str, Tensor]


def _model(family: str) -> PreTrainedModel:
    model = tiny_model(tiny_config(family, **ARCHITECTURES[family])).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)  # logits so small that their rounding is below 1e-6
    return model


def _update(
    model: PreTrainedModel, batch: Batch, max_tokens: int, *, shares_prompts: bool, packed: PackedPrompts | None = None
) -> _Update:
    """Compute a loss of all tokens in micro-batches. Rows are found again by their advantages."""
    policy = TokenLogprobs(model, temperature=0.8, chunk_size=50, packs_prompts=packed is not None)
    rows = {advantage: row for row, advantage in enumerate(batch.advantages_B.tolist())}
    found_2BT = torch.zeros(2, *batch.mask_BT.shape)
    total = 0.0
    model.zero_grad()
    for micro_batch in batch.micro_batches(max_tokens, shares_prompts=shares_prompts, packed=packed):
        both = torch.stack(policy(*micro_batch.model_inputs))
        loss = (both[0] * micro_batch.mask_BT * micro_batch.advantages_B[:, None]).sum() / batch.token_total
        loss.backward()
        total += loss.item()
        numbers = [rows[advantage] for advantage in micro_batch.advantages_B.tolist()]
        found_2BT[:, numbers, : both.shape[2]] = both.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return _Update(total, found_2BT[0], found_2BT[1], gradients)


def _batch() -> Batch:
    trajectories = [one for group in _groups() for one in group.trajectories]
    rows = [row for number, one in enumerate(trajectories) for row in rows_of(one, (number - 4.5) / 3, in_loss=True)]
    return pad(rows, trajectory_total=len(rows), token_total=sum(one.num_sampled for one in trajectories))


def _policy(model: PreTrainedModel, *, packs_prompts: bool) -> TokenLogprobs:
    return TokenLogprobs(model, temperature=1.0, chunk_size=50, packs_prompts=packs_prompts)


@contextmanager
def _computed_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """Number of tokens in each call of the model within the block."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    yield seen
    hook.remove()


@pytest.mark.parametrize("max_tokens", [60, 1000])
@pytest.mark.parametrize(
    ("family", "is_packed"), [(name, False) for name in ARCHITECTURES] + [(name, True) for name in PACKABLE]
)
def test_same_loss_gradients_logprobs_and_entropies(family: str, is_packed: bool, max_tokens: int):
    model = _model(family)
    with _computed_tokens(model) as tokens:
        expected = _update(model, _batch(), 1000, shares_prompts=False)
    if is_packed:
        checkpoint_gradients(model)
    with _computed_tokens(model) as fewer:
        got = _update(model, _batch(), max_tokens, shares_prompts=True, packed=FREE if is_packed else None)
    assert sum(fewer) < (0.9 if is_packed else 0.8) * sum(tokens)
    assert got.loss == pytest.approx(expected.loss, abs=1e-6)
    torch.testing.assert_close(got.logprobs_BT, expected.logprobs_BT, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.entropy_BT, expected.entropy_BT, atol=1e-6, rtol=1e-6)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient, atol=1e-6, rtol=1e-6, msg=name)
    assert difference_when_shared(_policy(model, packs_prompts=is_packed)) is None


def _config(**trainer: Any) -> TrainerConfig:
    given: dict[str, Any] = {"max_steps": 10, "rewards": [{"function": "rewards:r"}], "optim": {"learning_rate": 0.01}}
    return TrainerConfig.model_validate(given | trainer)


def _learner(model_dir: Path, **trainer: Any) -> Learner:
    torch.manual_seed(0)  # for the adapter
    shared = SharedConfig(model=str(model_dir))
    return Learner(shared, _config(**trainer), make_tokenizer(), Accelerator(cpu=True), needs_reference=True)


def _in_turns() -> Group:
    """Episodes of two turns, of which some have a second sequence with another prompt."""
    prompt, tool = _tokens(20, 1), _tokens(4, 2)
    turns = [sequence([(prompt, _tokens(3 + i, i)), (tool, _tokens(5, 9 + i))]) for i in range(4)]
    again = [sequence([(_tokens(15, 50), _tokens(6, 60 + i))]) for i in range(2)]
    parts = [[turns[0]], [turns[1], again[0]], [turns[2], again[1]], [turns[3]]]
    return Group(row=0, trajectories=tuple(trajectory(one, float(i % 3)) for i, one in enumerate(parts)))


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "reference, optimizer steps and entropies": {
        "grpo": {"beta": 0.1, "num_iterations": 2, "epsilon_high": 1.5, "top_entropy_quantile": 0.5}
    },
    "lora": {"lora": {"r": 4}, "grpo": {"beta": 0.1}},
    "online_dpo": {"algorithm": "online_dpo", "rollout": {"num_generations": 2}},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_update(model_dir: Path, options: dict[str, Any]):
    config = _config(**options)
    algorithm: Grpo | OnlineDpo = Grpo(config) if config.algorithm == "grpo" else OnlineDpo(config)
    groups = [*_groups(), _in_turns()]
    if config.algorithm == "online_dpo":
        groups = [group.model_copy(update={"trajectories": group.trajectories[1:3]}) for group in groups]

    def learned(shared_prompts: str) -> tuple[dict[str, float], Tensor, int]:
        split = {"max_tokens_per_micro_batch": 60, "shared_prompts": shared_prompts}
        learner = _learner(model_dir, learner=split, **options)
        with _computed_tokens(learner.model) as tokens:
            stats = [learner.update(algorithm.make_batch(groups), algorithm) for _ in range(2)][-1]
        parameters = torch.cat([p.detach().flatten() for p in learner.model.parameters() if p.requires_grad])
        return stats, parameters, sum(tokens)

    expected, their_parameters, their_tokens = learned("never")
    got, parameters, tokens = learned("auto")
    assert tokens < 0.9 * their_tokens
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # AdamW divides by the gradient's size, which amplifies rounding of tiny gradients.
    assert (parameters - their_parameters).abs().mean() < 1e-5


@pytest.mark.slow
def test_same_update_when_the_layers_are_compiled(model_dir: Path):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs g++")
    algorithm = Grpo(_config())

    def learned(shared_prompts: str) -> tuple[dict[str, float], Tensor]:
        options = {"compile": True, "max_tokens_per_micro_batch": 60, "shared_prompts": shared_prompts}
        learner = _learner(model_dir, learner=options)
        assert (learner.unshared_because is None) == (shared_prompts == "auto")
        stats = [learner.update(algorithm.make_batch(_groups()), algorithm) for _ in range(2)][-1]
        assert "_compiled_call_impl" in vars(learner.model.base_model)
        return stats, torch.cat([p.detach().flatten() for p in learner.model.parameters()])

    expected, their_parameters = learned("never")
    got, parameters = learned("auto")
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    # AdamW divides by the gradient's size, which amplifies rounding of tiny gradients.
    assert (parameters - their_parameters).abs().mean() < 1e-5


def test_same_update_with_gradient_checkpointing(model_dir: Path):
    algorithm = Grpo(_config(grpo={"beta": 0.1, "num_iterations": 2}))

    def learned(shared_prompts: str) -> tuple[dict[str, float], int]:
        options = {"gradient_checkpointing": True, "max_tokens_per_micro_batch": 400, "shared_prompts": shared_prompts}
        learner = _learner(model_dir, learner=options)
        assert (learner.unshared_because is None) == (shared_prompts == "auto")
        with _computed_tokens(learner.model) as tokens:
            stats = learner.update(algorithm.make_batch([*_groups(), _in_turns()]), algorithm)
        return stats, sum(tokens)

    expected, their_tokens = learned("never")
    got, tokens = learned("auto")
    assert tokens < 0.95 * their_tokens, "one prompt is worth packing in a model as small as this"
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_models_whose_attention_counts_columns_do_not_pack(family: str):
    model = _model(family)
    checkpoint_gradients(model)
    assert difference_when_shared(_policy(model, packs_prompts=True)) is not None


def _drop(name: str) -> Callable[..., Any]:
    def create(*arguments: Any, **options: Any) -> Any:
        return create_masks_for_generate(*arguments, **options | {name: None})

    return create


@pytest.mark.parametrize("name", ["or_mask_function", "and_mask_function"])
def test_a_wrong_mask_of_a_packed_row_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str):
    model = _model("mistral")
    checkpoint_gradients(model)
    policy = _policy(model, packs_prompts=True)
    assert difference_when_shared(policy) is None
    monkeypatch.setattr(packed_prompts, "create_masks_for_generate", _drop(name))
    assert "would differ by" in (difference_when_shared(policy) or "")


def test_a_model_that_ignores_the_cache_is_noticed():
    """transformers does that, with a warning, if gradients are checkpointed."""
    model = _model("llama")
    checkpoint_gradients(model)
    assert difference_when_shared(_policy(model, packs_prompts=False)) is not None


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"_attn_implementation": "eager"}, "eager attention"),
        ("qwen3", {"layer_types": ["full_attention", "odd_attention"]}, "layers with odd_attention"),
    ],
)
def test_models_whose_rows_cannot_be_packed_say_why(family: str, options: dict[str, Any], reason: str):
    model = _model(family)
    for name, value in options.items():
        setattr(model.config, name, value)
    why = why_unshared(_policy(model, packs_prompts=True), LearnerConfig(), 1024)
    assert reason in (why or "")


def test_the_cost_of_a_pair_is_counted_in_operations():
    """A layer has 4 H² + 3 H I multiplications per token, and its attention has 2 H per pair."""
    config = tiny_config("llama")
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    per_token = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    expected = packed_prompts.SLOWNESS * 2 * hidden / per_token
    assert packed_prompts.packed_prompts(_model("llama")).pair_cost == pytest.approx(expected, rel=0.01)


def test_a_model_whose_operations_cannot_be_counted_packs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_prompts, "FlopCounterMode", None)
    assert packed_prompts.packed_prompts(_model("llama")).pair_cost == float("inf")


def test_a_cache_without_gradients_is_noticed(monkeypatch: pytest.MonkeyPatch):
    of_rows = PromptCache.of_rows

    def without_gradients(self: PromptCache, prompt_B: Tensor, *, is_last: bool) -> tuple[Tensor, DynamicCache]:
        hidden_B1H, cache = of_rows(self, prompt_B, is_last=is_last)
        for layer in cache.layers:
            layer.keys = layer.keys.detach()
        return hidden_B1H, cache

    monkeypatch.setattr(PromptCache, "of_rows", without_gradients)
    policy = TokenLogprobs(_model("llama"), temperature=1.0, chunk_size=50)
    assert "would differ by" in (difference_when_shared(policy) or "")


def test_a_wrong_sliding_window_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DynamicSlidingWindowLayer, "get_mask_sizes", DynamicLayer.get_mask_sizes)
    policy = TokenLogprobs(_model("mistral"), temperature=1.0, chunk_size=50)
    assert difference_when_shared(policy) is not None


def test_prompts_are_not_shared_if_a_row_beyond_the_sliding_window_is_too_long_to_check():
    policy = TokenLogprobs(_model("mistral"), temperature=1.0, chunk_size=50)
    assert "sliding window" in (why_unshared(policy, LearnerConfig(), 20) or "")


def test_a_check_that_would_take_too_long_is_not_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_prompts, "difference_when_shared", lambda _: None)
    policy = TokenLogprobs(_model("mistral"), temperature=1.0, chunk_size=50)
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    assert why_unshared(policy, LearnerConfig(), 1024, most_operations=1000 * 6 * parameters) is None
    assert "take minutes" in (why_unshared(policy, LearnerConfig(), 1024, most_operations=10 * 6 * parameters) or "")


def test_a_cache_with_more_than_keys_and_values_is_refused():
    """These layers have keys and values too, besides the state of a recurrent layer."""
    with pytest.raises(TypeError, match="LinearAttentionAndFullAttentionLayer"):
        PromptCache(tiny_model(tiny_config("falcon_h1")).eval(), torch.tensor([[4, 5, 6]]))


def test_bfloat16_rounds_as_much_as_without_sharing():
    model = _model("llama")
    exact = _update(model, _batch(), 60, shares_prompts=False)

    def error(*, shares_prompts: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = _update(model, _batch(), 60, shares_prompts=shares_prompts)
        return sum(float((rounded.gradients[name] - exact.gradients[name]).square().sum()) for name in exact.gradients)

    assert 0 < error(shares_prompts=True) < 1.5 * error(shares_prompts=False)
