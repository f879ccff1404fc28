"""A checkpoint of another release is refused, with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem_rollout.errors import UserError
from tandem_trainer.run.checkpoint import FORMAT, STATE_FILE, STATE_KEYS, read_state


@pytest.mark.parametrize("state", [{}, {"format": 2}, {"format": FORMAT + 1}], ids=["1", "2", "newer"])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, state: dict[str, Any]):
    (tmp_path / STATE_FILE).write_text(json.dumps(dict.fromkeys(STATE_KEYS) | state))
    with pytest.raises(UserError, match=rf"has format {state.get('format', 1)}, expected {FORMAT}: .*tandem export"):
        read_state(tmp_path)


def test_a_checkpoint_of_this_format_is_read(tmp_path: Path):
    (tmp_path / STATE_FILE).write_text(json.dumps(dict.fromkeys(STATE_KEYS, 7) | {"format": FORMAT}))
    assert read_state(tmp_path) == dict.fromkeys(STATE_KEYS, 7)
