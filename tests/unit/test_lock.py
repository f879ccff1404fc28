"""A lock names its holder, and is released when the holder ends, even if it is killed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tandem_protocol.lock import Held, exclusive


def test_second_holder_is_refused_with_the_name_of_the_first(tmp_path: Path):
    with (
        exclusive(tmp_path / "run" / "LOCK", "a"),
        pytest.raises(Held, match=r"^a$"),
        exclusive(tmp_path / "run" / "LOCK", "b"),
    ):
        pytest.fail("both hold it")
    with exclusive(tmp_path / "run" / "LOCK", "b"):
        assert (tmp_path / "run" / "LOCK").read_text() == "b\n"


def _hold(file: Path, holding: object) -> None:
    with exclusive(file, "killed"):
        holding.set()  # type: ignore[attr-defined]
        multiprocessing.Event().wait()


def test_lock_is_released_when_its_holder_is_killed(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    holding = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "LOCK", holding))
    process.start()
    assert holding.wait(60)
    with pytest.raises(Held, match="killed"), exclusive(tmp_path / "LOCK", "next"):
        pytest.fail("both hold it")
    process.kill()
    process.join()
    with exclusive(tmp_path / "LOCK", "next"):
        pass
