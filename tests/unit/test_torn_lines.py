"""A process that is killed while it writes a line costs this line only, whoever reads or writes the file next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from support.run_folders import GROUPS, Saved, events, make_run
from tandem_cli.tail import JsonLinesReader
from tandem_trainer.run.metrics import JsonLinesWriter

FIRST, SECOND = '{"step": 1, "kind": "a"}', '{"step": 2, "kind": "b"}'


class Record(BaseModel):
    step: int


@pytest.mark.parametrize(
    ("torn", "steps"),
    [
        ("", [3]),
        (f"{FIRST}\n", [1, 3]),
        (f"{FIRST}\n{SECOND[:9]}", [1, 3]),
        (f"{FIRST}\n{SECOND}", [1, 2, 3]),  # only the newline is missing
        (SECOND[:1], [3]),
        (f"{FIRST}\n\0\0\0", [1, 3]),  # as some file systems leave it after a power failure
    ],
)
def test_the_next_line_does_not_continue_a_torn_one(tmp_path: Path, torn: str, steps: list[int]) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(torn)
    file = JsonLinesWriter(path)
    assert file.last_step() == (steps[-2] if len(steps) > 1 else -1)
    file.append([{"step": 3}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps
    assert [record.step for record in JsonLinesReader(path, Record).poll()] == steps
    assert file.last_step() == 3


def test_a_reader_skips_what_an_earlier_release_has_glued_together(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(f"{FIRST[:9]}{FIRST}\n{SECOND}\n")
    assert [record.step for record in JsonLinesReader(tmp_path / "eval.jsonl", Record).poll()] == [2]


def test_a_run_that_was_killed_while_it_wrote_an_event_keeps_all_others(tmp_path: Path) -> None:
    learner: Any = Saved()
    run = make_run(tmp_path)
    run.make_record(1, GROUPS, {"loss": 0.25})
    run.journal.note("settings_changed", 1, "a")
    file = tmp_path / "default" / "events.jsonl"
    file.write_text(file.read_text() + '{"step": 1, "time_unix')
    again = make_run(tmp_path)
    assert again.journal.finished_step == -1
    again.resume(learner, learner)
    again.journal.end(again.version, finished=True)
    assert [kind for kind, _ in events(tmp_path)] == ["settings_changed", "finished"]
    assert make_run(tmp_path).journal.finished_step == 0
