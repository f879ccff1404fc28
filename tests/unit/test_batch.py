"""Padding and micro-batches keep every token in its row."""

from __future__ import annotations

import pytest

from support.rollouts import completion, scored, sequence, single_turn, trajectory
from tandem_protocol.version import Version
from tandem_rollout.trajectory import Group, Sequence
from tandem_trainer.batch import NOTHING, Batch, pad, rows_of


def _batch(lengths: list[tuple[int, int]]) -> Batch:
    """Return a batch with rows of these prompt and completion lengths. All tokens of row i are i + 1."""
    turns = [single_turn([i + 1] * prompt, completion([i + 1] * size)) for i, (prompt, size) in enumerate(lengths)]
    rows = [row for i, turn in enumerate(turns) for row in rows_of(turn, float(i + 1), in_loss=True)]
    return pad(rows, trajectory_total=len(rows), token_total=sum(tokens for _, tokens in lengths))


def test_rows_are_padded_on_the_right():
    batch = _batch([(2, 1), (1, 3)])
    assert batch.token_ids_BS.tolist() == [[1, 1, 1, 0], [2, 2, 2, 2]]
    assert batch.mask_BT.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert batch.sampler_logprobs_BT.tolist() == [[-0.5, 0.0, 0.0], [-0.5, -1.0, -1.5]]
    assert batch.sampled_at_BT.tolist() == [[0, -1, -1], [0, 0, 0]]
    assert batch.sampled_mask_BT.tolist() == [[True, False, False], [True, True, True]]


def test_tokens_of_tools_are_in_the_row_but_not_in_the_masks():
    one = trajectory([sequence([([4, 5], [6, 7]), ([8, 9, 10], [11])], version=Version(3, 1))])
    batch = pad(rows_of(one, 2.0, in_loss=True), trajectory_total=1, token_total=3)
    assert batch.token_ids_BS.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert (batch.starts_B.tolist(), batch.ends_B.tolist()) == ([2], [8])
    assert batch.sampled_mask_BT.tolist() == [[True, True, False, False, False, True]]
    assert batch.mask_BT.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]
    assert batch.sampler_logprobs_BT.tolist() == [[-0.5, -1.0, 0.0, 0.0, 0.0, -1.5]]
    assert batch.sampled_at_BT.tolist() == [[3, 3, -1, -1, -1, 3]]
    outside = pad(rows_of(one, 2.0, in_loss=False), trajectory_total=1, token_total=3)
    assert outside.sampled_mask_BT.equal(batch.sampled_mask_BT)
    assert not outside.mask_BT.any()


def test_tokens_behind_the_last_sampled_one_are_cut_off():
    whole = sequence([([4], [6])])
    longer = Sequence(**dict(whole) | {"token_ids": (4, 6, 7, 8), "logprobs": (0.0, -0.5, 0.0, 0.0)})
    batch = pad(rows_of(trajectory([longer]), 1.0, in_loss=True), trajectory_total=1, token_total=1)
    assert batch.token_ids_BS.tolist() == [[4, 6]]


def test_each_sequence_with_sampled_tokens_is_a_row_that_knows_the_size_of_its_trajectory():
    nothing = Sequence(token_ids=(4, 5), logprobs=(0.0, 0.0))
    one = trajectory([sequence([([4], [6, 7])]), nothing, sequence([([4], [8]), ([9], [10])])])
    batch = pad(rows_of(one, -1.0, in_loss=True), trajectory_total=1, token_total=4)
    assert batch.token_ids_BS.tolist() == [[4, 6, 7, 0], [4, 8, 9, 10]]
    assert batch.trajectory_tokens_B.tolist() == [4, 4]
    assert batch.advantages_B.tolist() == [-1.0, -1.0]
    assert batch.unit_B.tolist() == [0, 1]


def test_micro_batches_contain_every_row_once_within_the_token_budget():
    batch = _batch([(9, 1), (1, 1), (4, 2), (2, 2), (1, 2), (20, 10)])
    micro_batches = list(batch.micro_batches(max_tokens=12))
    assert sorted(a for micro_batch in micro_batches for a in micro_batch.advantages_B.tolist()) == [1, 2, 3, 4, 5, 6]
    for micro_batch in micro_batches:
        assert micro_batch.token_ids_BS.numel() <= 12 or len(micro_batch.advantages_B) == 1
        assert micro_batch.unit_B.tolist() == [*range(len(micro_batch.advantages_B))]
        for row, advantage in enumerate(micro_batch.advantages_B.int().tolist()):
            length = int(micro_batch.ends_B[row])
            assert micro_batch.token_ids_BS[row, :length].tolist() == [advantage] * length
    assert len(micro_batches) == 4  # 2+3+4 padded to 12, then 6, 10 and 30 on their own


@pytest.mark.parametrize("max_tokens", [1, 12, 40])
def test_rows_of_one_unit_share_a_micro_batch(max_tokens: int):
    sizes = [(1, 3), (2,), (4, 1, 1)]
    units = [trajectory([sequence([([4], [number + 5] * size)]) for size in one]) for number, one in enumerate(sizes)]
    rows = [row for number, one in enumerate(units) for row in rows_of(one, number + 1.0, in_loss=True, unit=number)]
    found = []
    for micro_batch in pad(rows, trajectory_total=3, token_total=12).micro_batches(max_tokens):
        for unit in range(micro_batch.num_units):
            rows_B = micro_batch.unit_B == unit
            (advantage,) = {*micro_batch.advantages_B[rows_B].tolist()}
            found.append((advantage, sorted(micro_batch.mask_BT[rows_B].sum(1).int().tolist())))
    assert sorted(found) == [(1.0, [1, 3]), (2.0, [2]), (3.0, [1, 1, 4])]


def test_a_row_of_nothing_has_no_signal():
    (micro_batch,) = pad([NOTHING], trajectory_total=0, token_total=0).micro_batches(8)
    assert not micro_batch.mask_BT.any()
    assert not micro_batch.has_signal
    assert rows_of(single_turn([1], completion([])), 1.0, in_loss=True) == []


def test_a_group_has_a_signal_only_if_two_rewards_differ():
    completions = [completion([3]), completion([4])]
    assert scored([1], completions, [1.0, 0.0]).has_signal
    assert not scored([1], completions, [1.0, 1.0]).has_signal
    assert not scored([1], completions, [1.0, None]).has_signal


def test_a_group_can_be_stored_as_json():
    group = scored([1, 2], [completion([3], version=Version(4, 2)), completion([5, 6])], [1, None])
    assert Group.model_validate_json(group.model_dump_json()) == group
