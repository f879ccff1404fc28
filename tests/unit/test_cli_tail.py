"""Reads the trainer's files while it writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tandem_cli import tail
from tandem_cli.progress import gauge
from tandem_cli.tail import JsonLinesReader


class Line(BaseModel):
    step: int


def test_a_half_written_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLinesReader(path, Line)
    assert lines.poll() == []  # the file does not exist yet
    path.write_text('{"step": 1}\n{"st')
    assert lines.poll() == [Line(step=1)]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert lines.poll() == [Line(step=2)]
    assert lines.poll() == []
    assert lines.records == [Line(step=1), Line(step=2)]


def test_a_line_that_is_too_long_is_skipped_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LINE_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 5000)
    lines = JsonLinesReader(path, Line)
    assert lines.poll() == [Line(step=1)]
    path.write_bytes(path.read_bytes().replace(b"x" * 3000, b"y" * 3000) + b'{"step": 9}\n{"step": 2}\n{"st')
    assert lines.poll() == [Line(step=2)], "its first part was not read again, although it has changed"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    assert lines.poll() == lines.records == [Line(step=1), Line(step=2)]


@given(cuts=st.lists(st.integers(1, 30), max_size=12))
def test_every_line_is_read_once_however_the_writes_are_split(cuts: list[int], tmp_path_factory: object) -> None:
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"  # type: ignore[attr-defined]  # pytest keeps its class private
    data = b"".join(b'{"step": %d}\n' % n for n in range(10))
    lines = JsonLinesReader(path, Line)
    with path.open("ab", buffering=0) as file:
        for cut in [*cuts, len(data)]:
            file.write(data[:cut])
            data = data[cut:]
            lines.poll()
    assert [line.step for line in lines.records] == list(range(10))


def test_a_file_that_a_resumed_run_has_truncated_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLinesReader(path, Line)
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines.poll()
    path.write_text('{"step": 1}\n')
    lines.poll()
    assert lines.records == [Line(step=1)]


def test_a_gauge_is_summed_over_its_labels_and_the_first_name_wins() -> None:
    page = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 4.0\ntandem_running 1.0\n'
    assert gauge(page, "vllm:num_requests_running", "tandem_running") == 7
    assert gauge(page, "no_such", "tandem_running") == 1
    assert gauge(page, "tandem_run") == 0
