"""Padding and micro-batches keep every token in its row."""

from __future__ import annotations

from support.rollouts import completion, scored
from tandem_protocol.version import Version
from tandem_rollout.scored_group import ScoredGroup
from tandem_trainer.batch import Batch, Row, pad


def _batch(lengths: list[tuple[int, int]]) -> Batch:
    """Return a batch with rows of these prompt and completion lengths. All tokens of row i are i + 1."""
    rows = [
        Row(
            [i + 1] * prompt, completion([i + 1] * tokens), advantage=float(i + 1), in_loss=True
        )
        for i, (prompt, tokens) in enumerate(lengths)
    ]  # fmt: skip
    return pad(rows, row_total=len(rows), token_total=sum(tokens for _, tokens in lengths))


def test_rows_are_padded_on_the_right():
    batch = _batch([(2, 1), (1, 3)])
    assert batch.token_ids_BS.tolist() == [[1, 1, 1, 0], [2, 2, 2, 2]]
    assert batch.mask_BT.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert batch.sampler_logprobs_BT.tolist() == [[-0.5, 0.0, 0.0], [-0.5, -1.0, -1.5]]
    assert batch.completion_mask_BT.tolist() == [[True, False, False], [True, True, True]]


def test_micro_batches_contain_every_row_once_within_the_token_budget():
    batch = _batch([(9, 1), (1, 1), (4, 2), (2, 2), (1, 2), (20, 10)])
    micro_batches = list(batch.micro_batches(max_tokens=12))
    assert sorted(a for micro_batch in micro_batches for a in micro_batch.advantages_B.tolist()) == [1, 2, 3, 4, 5, 6]
    for micro_batch in micro_batches:
        assert micro_batch.token_ids_BS.numel() <= 12 or len(micro_batch.advantages_B) == 1
        for row, advantage in enumerate(micro_batch.advantages_B.int().tolist()):
            length = int(micro_batch.prompt_lengths_B[row] + micro_batch.completion_lengths_B[row])
            assert micro_batch.token_ids_BS[row, :length].tolist() == [advantage] * length
    assert len(micro_batches) == 4  # 2+3+4 padded to 12, then 6, 10 and 30 on their own


def test_micro_batches_accept_rows_without_tokens():
    (micro_batch,) = _batch([(1, 0)]).micro_batches(8)
    assert micro_batch.mask_BT.shape == (1, 0) or micro_batch.mask_BT.sum() == 0
    assert not micro_batch.has_signal


def test_a_scored_group_can_be_stored_as_json():
    group = scored(
        [1, 2], [completion([3], version=Version(4, 2)), completion([5, 6], version=Version(3, 2))], [1, None]
    )
    again = ScoredGroup.model_validate_json(group.model_dump_json())
    assert again == group
    assert again.oldest_step == 3


def test_a_group_has_a_signal_only_if_two_rewards_differ():
    completions = [completion([3]), completion([4])]
    assert scored([1], completions, [1.0, 0.0]).has_signal
    assert not scored([1], completions, [1.0, 1.0]).has_signal
    assert not scored([1], completions, [1.0, None]).has_signal
