"""Trajectories of a run are found, searched and shown from a file of any size, which is never written."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tandem_cli import tail
from tandem_cli.watch import json_lines, rollouts
from tandem_cli.watch.rollouts import MAX_MATCHES, MAX_ROWS, Moved, Query, Rollouts


@pytest.fixture(autouse=True)
def on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer end because it took long. Tests of that set `READ_S` themselves."""
    monkeypatch.setattr(rollouts, "READ_S", 60.0)


def record(step: int, reward: float | None, text: str = "four", **others: Any) -> dict[str, Any]:
    return {
        "step": step,
        "row": 1,
        "prompt": "2+2?",
        "completion": text,
        "reward": reward,
        "status": "finished",
    } | others


def run(folder: Path, *records: dict[str, Any]) -> Rollouts:
    path = folder / "rollouts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return Rollouts(path)


def rewards(answer: dict[str, Any]) -> list[float | None]:
    return [row.get("reward") for row in answer["rows"]]


def test_a_step_has_its_trajectories_and_its_neighbours(tmp_path: Path) -> None:
    found = run(tmp_path, record(1, 0.0), record(1, 1.0), record(4, 0.5), record(9, None))
    assert found.span() | {"size_bytes": 0} == {"first": 1, "last": 9, "size_bytes": 0}
    step = found.of_step(4)
    assert (rewards(step), step["earlier"], step["later"], step["next"]) == ([0.5], 1, 9, None)
    missing = found.of_step(5)
    assert (rewards(missing), missing["earlier"], missing["later"]) == ([], 4, 9)
    assert (rewards(found.of_step(9)), found.of_step(9)["later"]) == ([None], None)
    assert found.one(step["rows"][0]["at"]) == record(4, 0.5)


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    bytes_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size if size is not None else -1) or b""
        Counted.bytes_read += len(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        data = self.read(size if size is not None else -1)
        line, newline, _ = data.partition(b"\n")
        self.seek(start + len(line + newline))
        return line + newline


@pytest.mark.parametrize("place", ["at the beginning", "at the end", "at the end, still being written"])
def test_long_damaged_lines_are_not_read_again_when_the_page_asks_for_news(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page asks every two seconds."""
    for module in (json_lines, tail):
        monkeypatch.setattr(module, "LINE_BYTES", 1 << 20)
    path = tmp_path / "rollouts.jsonl"
    good, bad = [json.dumps(record(step, 1.0)) + "\n" for step in (1, 2)], "x" * (8 << 20)
    path.write_text(
        {"at the beginning": f"{bad}\n{good[0]}", "at the end": f"{good[0]}{bad}\n"}.get(place, good[0] + bad)
    )
    monkeypatch.setattr(Path, "open", lambda self, _: Counted(self))
    found = Rollouts(path)
    assert (found.span()["first"], found.span()["last"]) == (1, 1)
    Counted.bytes_read = 0
    for _ in range(3):
        assert (found.span()["first"], found.span()["last"]) == (1, 1)
    assert Counted.bytes_read < 2 << 20
    with io.open(path, "a") as file:  # noqa: UP020 - Path.open is replaced
        file.write("\n" + good[1])
    assert (found.span()["first"], found.span()["last"]) == (1, 2)


def test_a_run_without_rollouts_has_none(tmp_path: Path) -> None:
    found = Rollouts(tmp_path / "absent/rollouts.jsonl")
    assert found.span() == {"first": None, "last": None, "size_bytes": 0}
    assert found.of_step(1)["rows"] == found.search(Query(text="a"))["rows"] == []


def test_a_large_step_and_a_long_search_come_in_parts(tmp_path: Path) -> None:
    found = run(tmp_path, *(record(1, float(n)) for n in range(2 * MAX_ROWS + 1)), record(2, -1.0))
    for ask in (lambda after: found.of_step(1, after), lambda after: found.search(Query(to_step=1, after=after))):
        parts, after = [], None
        while True:
            answer = ask(after)
            parts.append(rewards(answer))
            if (after := answer["next"]) is None:
                break
        assert [reward for part in parts for reward in part] == [float(n) for n in range(2 * MAX_ROWS + 1)]
        assert max(map(len, parts)) in (MAX_ROWS, MAX_MATCHES)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [0.0, 0.5, 1.0, None, 2.0]),
        ({"text": "FOUR"}, [0.0, 1.0, 2.0]),
        ({"text": 'say "fünf"'}, [0.5]),
        ({"text": "ÜNF"}, [0.5]),
        ({"text": "calculate"}, [1.0]),
        ({"text": '"x": "é"'}, [1.0]),
        ({"text": "tool_calls"}, []),
        ({"text": "role"}, []),
        ({"text": "timed out"}, [None]),
        ({"min_reward": 0.5}, [0.5, 1.0, 2.0]),
        ({"min_reward": 0.5, "max_reward": 1.0}, [0.5, 1.0]),
        ({"status": "failed"}, [None]),
        ({"tool_errors": True}, [1.0]),
        ({"from_step": 2}, [1.0, None, 2.0]),
        ({"from_step": 1, "to_step": 2, "text": "four"}, [0.0, 1.0]),
    ],
    ids=str,
)
def test_a_search_finds_what_fulfils_all_conditions(
    tmp_path: Path, query: dict[str, Any], expected: list[float | None]
) -> None:
    function = {"name": "calculate", "arguments": '{"x": "é"}'}
    calls = [{"role": "assistant", "tool_calls": [{"function": function}]}]
    found = run(
        tmp_path,
        record(1, 0.0),
        record(1, 0.5, 'I say "Fünf"'),
        record(2, 1.0, messages=calls, tool_errors=1),
        record(2, None, "", status="failed", reason="ToolError: timed out"),
        record(3, 2.0),
    )
    assert rewards(found.search(Query(**query))) == expected


def test_an_answer_reads_a_bounded_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, *(record(1, float(n), "x" * 10_000) for n in range(100)))
    monkeypatch.setattr(rollouts, "READ_BYTES", 100_000)
    answer = found.search(Query(text="absent"))
    assert answer["rows"] == []
    assert 0.05 < answer["read"] < 0.2
    assert len(found.of_step(1)["rows"]) < 20


def test_each_answer_of_a_slow_search_reads_at_least_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, *(record(1, float(n)) for n in range(3)))
    monkeypatch.setattr(rollouts, "READ_S", -1.0)
    after, read = None, []
    for _ in range(3):
        answer = found.search(Query(after=after))
        read += rewards(answer)
        after = answer["next"]
    assert (read, after) == ([0.0, 1.0, 2.0], None)


def test_each_part_of_a_step_says_which_step_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MAX_ROWS", 2)
    found = run(tmp_path, *(record(1, float(n)) for n in range(3)), record(4, 1.0), record(9, 1.0))
    first = found.of_step(1)
    second = found.of_step(1, first["next"])
    assert [(len(part["rows"]), part["earlier"], part["later"]) for part in (first, second)] == [
        (2, None, 4),
        (1, None, 4),
    ]
    assert second["next"] is None


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    block = "".join(json.dumps(record(0, 0.5, "x" * 20_000)) + "\n" for _ in range(10))
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        for step in range(1000):
            file.write(block.replace('"step": 0', f'"step": {step}'))
        assert file.tell() > 200_000_000
    found = Rollouts(tmp_path / "rollouts.jsonl")
    tracemalloc.start()
    try:
        assert found.span()["last"] == 999
        for step in (0, 500, 999):
            assert len(found.of_step(step)["rows"]) == 10
        assert rewards(found.search(Query(from_step=700, to_step=700))) == [0.5] * 10
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
        (tmp_path / "rollouts.jsonl").unlink()  # pytest keeps the folders of its last runs


def test_a_list_shows_the_beginning_and_the_end_of_a_long_text(tmp_path: Path) -> None:
    found = run(tmp_path, record(1, 1.0, "y" * 999_999 + "z"))
    (row,) = found.of_step(1)["rows"]
    assert len(json.dumps(row)) < 1000
    assert (row["completion"][0], row["completion_end"][-2:]) == ("y", "yz")
    assert len(found.one(row["at"])["completion"]) == 1_000_000


def test_an_offset_that_is_not_valid_any_more_is_reported(tmp_path: Path) -> None:
    found = run(tmp_path, record(1, 0.0), record(2, 1.0), record(3, 1.0))
    at = found.of_step(3)["rows"][0]["at"]
    run(tmp_path, record(1, 0.0, "a longer text"), record(2, 1.0), record(3, 1.0))
    for ask in (lambda: found.one(at), lambda: found.of_step(3, at), lambda: found.search(Query(after=at))):
        with pytest.raises(Moved):
            ask()
    for offset in (-1, 10**9, 10**30):
        with pytest.raises(Moved):
            found.one(offset)


def test_damaged_lines_and_fields_of_other_types_are_shown_and_break_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    odd = {"step": 2, "row": "x", "reward": "high", "rewards": [1], "completion": 5, "status": None, "messages": "?"}
    path.write_text(f'{{"step": 1}}\n\0\0\n{json.dumps(odd)}\n{{"st')
    found = Rollouts(path)
    assert found.span()["last"] == 2
    first, damaged = found.of_step(1)["rows"]
    assert (first["step"], "cannot be read" in damaged["damaged"]) == (1, True)
    (row,) = found.of_step(2)["rows"]
    assert (row["rewards"], row["completion"], "reward" in row) == ({}, "", False)
    assert rewards(found.search(Query(min_reward=0.0))) == []
