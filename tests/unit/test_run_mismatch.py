"""A run that ends because of a too high mismatch does not resume with the samples that caused it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.rollouts import completion, scored
from support.run_folders import Saved, make_run
from tandem_rollout.errors import UserError
from tandem_trainer.learner.mismatch import MismatchTooHigh

GROUPS = [scored([4], [completion([5]), completion([6])], [1.0, 0.0])]


class Queue(Saved):
    """Remembers whether its samples were dropped."""

    is_dropped = False

    def forget_samples(self) -> None:
        self.is_dropped = True


@pytest.mark.parametrize(("error", "is_dropped"), [(MismatchTooHigh("x"), True), (UserError("x"), False)])
def test_samples_with_wrong_probabilities_are_not_in_the_checkpoint(tmp_path: Path, error: UserError, is_dropped: bool):
    run, queue = make_run(tmp_path), Queue()
    run.make_record(3, GROUPS, {"loss": 0.25})
    with pytest.raises(UserError, match="x"), run.checkpoint_on_failure(queue, queue):  # type: ignore[arg-type]
        raise error
    assert queue.is_dropped == is_dropped
