"""The figures of a run for its charts: thinned, and only what is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_cli.tail import GrowingFile
from tandem_cli.watch.series import MAX_FIGURES, POINTS, Series, figures
from tandem_cli.watch.timeline import Timeline


def write(path: Path, records: list[dict[str, Any]], mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class Page:
    """Keeps the columns as the page does."""

    def __init__(self) -> None:
        self.cursor = ""
        self.columns: dict[str, list[float | None]] = {}

    def take(self, answer: dict[str, Any]) -> None:
        if answer["start"] == 0:
            self.columns = {}
        for name, column in answer["columns"].items():
            known = self.columns.get(name, [])[: answer["start"]]
            self.columns[name] = known + [None] * (answer["start"] - len(known)) + column["mean"]
        self.cursor = answer["cursor"]


@settings(max_examples=12)
@given(parts=st.lists(st.integers(0, 700), min_size=1, max_size=8))
def test_a_page_that_asks_for_news_has_the_same_points_as_one_that_asks_for_all(
    parts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    series, page, step = Series(path), Page(), 0
    for part in parts:
        records = [{"step": step + i, "late": i if step > 500 else None} for i in range(1, part + 1)]
        step += part
        write(path, records)
        page.take(series.read(page.cursor))
        whole = Page()
        whole.take(Series(path).read())
        assert page.columns == whole.columns
        assert all(len(column) <= POINTS for column in page.columns.values())


def test_a_point_of_a_long_run_has_the_mean_and_the_extremes_of_its_steps(tmp_path: Path) -> None:
    write(tmp_path / "m", [{"step": n, "grad_norm": 1000.0 if n == 1234 else 1.0} for n in range(4 * POINTS)])
    answer = Series(tmp_path / "m").read()
    column = answer["columns"]["grad_norm"]
    assert answer["bucket"] == 4
    assert (max(column["high"]), min(column["low"]), max(column["mean"])) == (1000.0, 1.0, 250.75)


def test_a_file_that_a_resumed_run_has_cut_and_continued_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": n, "version": f"{n}.1", "reward_mean": n / 7} for n in range(1, 6)])
    series, page = Series(path), Page()
    page.take(series.read())
    write(path, [{"step": n, "version": f"{n}.1", "reward_mean": n / 7} for n in range(1, 4)], "w")
    write(path, [{"step": n, "version": f"{n}.2", "reward_mean": n / 9} for n in range(4, 9)])  # longer than before
    page.take(series.read(page.cursor))
    assert page.columns["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert page.columns["reward_mean"][-1] == pytest.approx(8 / 9)
    assert [(mark["step"], mark["kind"]) for mark in series.marks] == [(4, "resumed")]


def test_a_line_is_read_once_it_is_complete_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    series = Series(path)
    assert series.read()["rows"] == 0, "the file does not exist yet"
    path.write_text('{"step": 1}\n\0\0\n[3]\n{"st')
    assert series.read()["rows"] == 1
    with path.open("a") as file:
        file.write('ep": 2, "a": NaN, "b": 1e999, "c": true, "d": "x", "e": null}\n')
    answer = series.read()
    assert answer["columns"]["step"]["mean"] == [1, 2]
    assert answer["columns"].keys() == {"step"}
    json.dumps(answer, allow_nan=False)


def test_figures_have_the_names_of_their_fields_and_keys() -> None:
    record = {"step": 3, "version": "3.2", "timings": {"update_s": 0.5}, "eval": {"pass_at": {"f": {"4": 1}}}}
    assert dict(figures(record)) == {"step": 3, "attempt": 2, "timings.update_s": 0.5, "eval.pass_at.f.4": 1}
    assert str(dict(figures({"a": 10**400}))["a"]) == "nan"


def test_two_figures_of_one_name_in_a_line_do_not_shift_the_column(tmp_path: Path) -> None:
    write(tmp_path / "m", [{"step": n, "a.b": n, "a": {"b": -n}} for n in (1, 2, 3)])
    assert Series(tmp_path / "m").read()["columns"]["a.b"]["mean"] == [1, 2, 3]


def test_a_cursor_of_an_earlier_server_is_not_taken_for_one_of_this_server(tmp_path: Path) -> None:
    page = Page()
    for folder, offset in ((tmp_path / "a", 0), (tmp_path / "b", 100)):
        folder.mkdir()
        write(folder / "metrics.jsonl", [{"step": n + offset} for n in (1, 2, 3)])
        write(folder / "events.jsonl", [{"step": 1, "kind": "finished"}])
    page.take(Series(tmp_path / "a/metrics.jsonl").read())
    page.take(Series(tmp_path / "b/metrics.jsonl").read(page.cursor))
    assert page.columns == {"step": [101, 102, 103]}
    first, second = (Timeline(folder, Series(folder / "metrics.jsonl")) for folder in (tmp_path / "a", tmp_path / "b"))
    assert second.read(first.read()["cursor"])["events"]


def test_the_number_of_figures_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "m", [{"step": n, "staleness": {str(n * 100 + i): 1 for i in range(100)}} for n in range(20)])
    assert len(Series(tmp_path / "m").read()["columns"]) == MAX_FIGURES


def test_a_mark_before_the_offset_shows_that_a_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = GrowingFile(path)
    path.write_text("a\nb\n")
    assert list(file.poll()) == [b"a\n", b"b\n"]
    path.write_text("a\nc\nd\n")
    assert list(file.poll()) == [b"a\n", b"c\n", b"d\n"]
    assert file.generation == 1


@pytest.mark.parametrize("between", ["missing", "empty", "begun"])
def test_a_run_that_begins_again_in_the_same_folder_replaces_the_earlier_one(tmp_path: Path, between: str) -> None:
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    write(metrics, [{"step": n, "timings": {"checkpoint_s": 1.0}} for n in range(1, 4)])
    write(events, [{"step": 3, "kind": "finished"}])
    series, page = Series(metrics), Page()
    timeline = Timeline(tmp_path, series)
    page.take(series.read())
    before = timeline.read()
    assert len(before["events"]) == 4
    for path in (metrics, events):
        path.rename(f"{path}.1")
        if between != "missing":
            path.write_text("" if between == "empty" else '{"step": 1')
    page.take(series.read(page.cursor))
    assert page.columns == {}
    assert timeline.read(before["cursor"])["events"] == []
    for path in (metrics, events):
        write(path, [{"step": n} for n in range(1, 6)], "w")
    page.take(series.read(page.cursor))
    assert page.columns == {"step": [1, 2, 3, 4, 5]}
    assert [event["step"] for event in timeline.read()["events"]] == [1, 2, 3, 4, 5]


def test_the_timeline_has_events_evaluations_and_checkpoints_by_step(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [{"step": n, "timings": {"checkpoint_s": 2.0 * (n == 2)}} for n in range(1, 5)])
    write(tmp_path / "eval.jsonl", [{"step": 3, "n": 8, "reward_mean": 0.25}, {"step": 4, "reward_mean": None}])
    write(tmp_path / "events.jsonl", [{"step": 1, "time_unix_s": 5.0, "kind": "mismatch", "message": "m"}, {"odd": 1}])
    steps = Series(tmp_path / "metrics.jsonl")
    steps.read()
    timeline = Timeline(tmp_path, steps)
    answer = timeline.read()
    assert [(event.get("step"), event.get("kind")) for event in answer["events"]] == [
        (None, None), (1, "mismatch"), (2, "checkpoint"), (3, "evaluation"), (4, "evaluation"),
    ]  # fmt: skip
    assert answer["events"][3]["message"] == "Reward 0.25 on 8 prompts."
    assert timeline.read(answer["cursor"])["events"] is None
    write(tmp_path / "events.jsonl", [{"step": 9, "kind": "finished"}])
    assert timeline.read(answer["cursor"])["events"][-1]["kind"] == "finished"
