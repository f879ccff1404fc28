"""Every file format gives the same rows, and text is not changed."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tandem_protocol.config.rollout import PromptsConfig
from tandem_rollout.data_files import read_rows
from tandem_rollout.errors import UserError

ANSWERS = [
    "012",
    "NA",
    "",
    "2",
    "2.0",
    "True",
    "null",
    "nan",
    "1e5",
    "2020-01-01",
    " x ",
    "x\u2028y\u0085z",
    'a "b", c',
    "é",
]
"""Text that libraries convert to other types or split into lines. Each is the answer of one row."""
ROWS = [{"prompt": f"{i}+{i}=", "answer": answer} for i, answer in enumerate(ANSWERS)]


def _jsonl(end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in ROWS).encode()


def _table(delimiter: str = ",", end: str = "\r\n") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def _parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


def _zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


BOM = "\ufeff".encode()
FILES: dict[str, Callable[[], bytes]] = {
    "prompts.jsonl": _jsonl,
    "prompts.JSONL": _jsonl,
    "prompts.ndjson": _jsonl,
    "windows.jsonl": lambda: BOM + _jsonl("\r\n"),
    "old-mac.jsonl": lambda: _jsonl("\r"),
    "blank-lines.jsonl": lambda: b"\n" + _jsonl("\n \n"),
    "no-last-line-end.jsonl": lambda: _jsonl().rstrip(),
    "escaped.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "array.json": lambda: json.dumps(ROWS).encode(),
    "indented-array.json": lambda: BOM + json.dumps(ROWS, indent=2).encode(),
    "lines.json": _jsonl,
    "prompts.jsonl.gz": lambda: gzip.compress(_jsonl()),
    "prompts.json.GZ": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "unpacked.jsonl.gz": _jsonl,
    "packed.jsonl": lambda: gzip.compress(_jsonl()),
    "prompts.jsonl.bz2": lambda: bz2.compress(_jsonl()),
    "prompts.jsonl.zst": lambda: _zstd(_jsonl()),
    "prompts.csv": _table,
    "prompts.CSV": _table,
    "windows.csv": lambda: BOM + _table(),
    "unix.csv": lambda: _table(end="\n"),
    "old-mac.csv": lambda: _table(end="\r"),
    "blank-lines.csv": lambda: _table() + b"\r\n\r\n",
    "prompts.csv.gz": lambda: gzip.compress(_table()),
    "prompts.tsv": lambda: _table("\t"),
    "prompts.tsv.bz2": lambda: bz2.compress(_table("\t")),
    "prompts.parquet": _parquet,
    "prompts.PARQUET": _parquet,
}


def _read(path: Path, **config: Any) -> list[dict[str, Any]]:
    return list(read_rows(PromptsConfig(source=str(path), **config)).rows)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(FILES[name]())
    assert _read(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    "name", ["train.csv", "train.tsv", "train.jsonl", "train.json", "train.parquet", "data/train-00000-of-00001.jsonl"]
)
def test_a_folder_gives_the_rows_of_its_files(tmp_path: Path, name: str):
    data = {".csv": _table(), ".tsv": _table("\t"), ".parquet": _parquet(), ".json": json.dumps(ROWS).encode()}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data.get(Path(name).suffix, _jsonl()))
    assert _read(tmp_path) == ROWS


def test_a_folder_saved_by_datasets_gives_its_rows(tmp_path: Path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert _read(tmp_path / "saved") == _read(tmp_path / "splits") == ROWS


def test_numbers_of_json_are_not_changed_in_a_file_or_a_folder(tmp_path: Path):
    rows = [{"n": 12345678901234567890, "x": 1}, {"n": 1, "x": "one"}, {"n": 0.1, "x": None, "y": [{"a": None}]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _read(tmp_path) == _read(tmp_path / "train.jsonl") == rows


def test_values_of_parquet_become_python_objects(tmp_path: Path):
    row = {
        "big": 2**64 - 1,
        "price": decimal.Decimal("1.50"),
        "when": datetime.datetime(2020, 1, 2, 3, 4),
        "day": datetime.date(2020, 1, 2),
        "raw": b"\x00\xff",
        "nested": {"list": [1, None], "text": "x"},
        "nothing": None,
    }
    table = pyarrow.Table.from_pylist(
        [row],
        pyarrow.schema(
            [(name, pyarrow.uint64() if name == "big" else pyarrow.scalar(value).type) for name, value in row.items()]
        ),
    )
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet")
    (got,) = _read(tmp_path / "prompts.parquet")
    assert got == row
    assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in row.items()}


@pytest.mark.parametrize(
    ("split", "answers"),
    [("train", ANSWERS), ("train[:2]", ANSWERS[:2]), ("train[1:3]+train[-1:]", [*ANSWERS[1:3], "é"])],
)
@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv", "prompts.parquet", "folder/train.csv"])
def test_a_slice_of_a_split_gives_the_same_rows_in_every_format(
    tmp_path: Path, name: str, split: str, answers: list[str]
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(FILES[Path(name).name.replace("train", "prompts")]())
    source = (tmp_path / name).parent if "/" in name else tmp_path / name
    assert [row["answer"] for row in _read(source, split=split)] == answers


def test_the_splits_of_a_folder_can_be_read_separately(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "b"}\n')
    assert _read(tmp_path) == [{"prompt": "a"}]
    assert _read(tmp_path, split="test") == [{"prompt": "b"}]
    assert _read(tmp_path, split="train+test") == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(UserError, match=r"prompts.split is 'dev', expected one of \['test', 'train'\]"):
        _read(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", _jsonl().decode().encode("utf-16"), ["a.jsonl is UTF-16, expected UTF-8", "iconv"]),
        ("a.csv", _table().decode().encode("utf-16-be"), ["a.csv is UTF-16", "iconv"]),
        ("a.csv", b"prompt\na\ncaf\xe9\n", ["a.csv line 3 is not UTF-8", "0xe9"]),
        ("a.csv", b"prompt,answer\na,1\nb,1,2\n", ["line 3 has 3 values, expected 2", "quotes"]),
        ("a.csv", b"prompt,answer\na,1\nb\n", ["line 3 has 1 values, expected 2"]),
        ("a.csv", b"prompt,answer,answer\na,1,2\n", ["line 1 has two columns named 'answer'"]),
        ("a.csv", b'prompt,answer\n"a,1\nb,2\n', ["is not CSV"]),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": }\n', ["line 3 is not JSON", "one object per line"]),
        (
            "a.jsonl",
            b'{"prompt": "a", "answer": NaN}\n',
            ["line 1 has the value NaN, expected JSON. Fix: write null."],
        ),
        ("a.jsonl", b'{"prompt": "a", "answer": -Infinity}\n', ["line 1", "-Infinity"]),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"x": {"b": 1, "b": 2}}\n',
            ["line 2 has the key 'b' twice"],
        ),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, ["line 1"]),
        ("a.jsonl", b'"prompt"\n', ["line 1 is a str", "expected an object"]),
        ("a.json", b'[{"prompt": "a"}, "b"]', ["item 1", "'b'"]),
        ("a.json", b'[{"prompt": "a"},]', ["a.json is not JSON"]),
        ("a.json", b"[1]\n[2]\n", ["line 1 is a list"]),
        ("a.jsonl.gz", gzip.compress(_jsonl())[:-20], ["a.jsonl.gz cannot be read"]),
        ("a.parquet", b"no parquet", ["a.parquet' cannot be loaded"]),
        ("a.xlsx", b"PK", ["a.xlsx' has an unknown format", ".jsonl", ".parquet"]),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_line(
    tmp_path: Path, name: str, data: bytes, words: list[str]
):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        _read(tmp_path / name)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.csv.gz", "nowhere.parquet", "nowhere", "folder.jsonl"])
def test_a_missing_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"prompts.source .*{name}"):
        _read(tmp_path / name)


def test_a_file_has_no_subsets_and_only_the_split_train(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_jsonl())
    with pytest.raises(UserError, match=r"prompts.subset is 'main', but .*a.jsonl' is a file"):
        _read(tmp_path / "a.jsonl", subset="main")
    with pytest.raises(UserError, match=r"prompts.split is 'test', expected one of \['train'\]"):
        _read(tmp_path / "a.jsonl", split="test")


def test_a_long_value_of_a_csv_file_is_read_completely(tmp_path: Path):
    (tmp_path / "a.csv").write_text(f"prompt\n{'x' * 200_000}\n")
    assert _read(tmp_path / "a.csv") == [{"prompt": "x" * 200_000}]
