"""`tandem watch --all`, behind a proxy and with a token that somebody has chosen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tandem_cli.__main__ import main
from tandem_cli.watch.guard import Guard
from tandem_cli.watch.runs import AllRuns
from tandem_cli.watch.server import make_app

TOKEN = "secret"
URL = "https://watch.example.com"


def write_run(folder: Path, *, age_s: int = 0) -> None:
    folder.mkdir(parents=True)
    file = folder / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "name": folder.name}) + "\n")
    os.utime(file, (1e9 - age_s, 1e9 - age_s))


def client(folder: Path, url: str = "http://127.0.0.1:8600") -> TestClient:
    app = make_app(AllRuns(folder), TOKEN, "0.0.0.0", url)
    made = TestClient(app, base_url=url, follow_redirects=False)
    made.get("/", params={"token": TOKEN})
    return made


def names(page: TestClient) -> list[str]:
    return [state["name"] for state in page.get("/api/runs").json()]


def test_all_runs_of_a_folder_are_shown_and_one_that_begins_later_follows(tmp_path: Path) -> None:
    page = client(tmp_path / "runs")
    assert names(page) == [], "the folder does not exist yet"
    write_run(tmp_path / "runs/older", age_s=60)
    write_run(tmp_path / "runs/newer")
    (tmp_path / "runs/not-a-run").mkdir()
    assert names(page) == ["newer", "older"]
    write_run(tmp_path / "runs/newest", age_s=-60)
    assert names(page) == ["newer", "older", "newest"], "a run keeps its place, which the page uses"
    assert page.get("/api/runs/2/steps").json()["columns"]["step"]["mean"] == [1]
    assert page.get("/api/runs/3/steps").status_code == 404


def test_the_name_of_the_address_for_browsers_is_accepted_and_no_other(tmp_path: Path) -> None:
    assert names(client(tmp_path, URL)) == []
    assert client(tmp_path, URL).get("/api/runs", headers={"host": "evil.example"}).status_code == 403
    assert not Guard(TOKEN, "127.0.0.1").is_own_name("watch.example.com")
    assert not Guard(TOKEN, "127.0.0.1").is_own_name("")


@pytest.mark.parametrize(("url", "is_secure"), [(URL, True), ("http://127.0.0.1:8600", False)])
def test_the_cookie_is_sent_encrypted_only_where_the_page_is_encrypted(
    tmp_path: Path, url: str, is_secure: bool
) -> None:
    page = TestClient(make_app(AllRuns(tmp_path), TOKEN, "127.0.0.1", url), base_url=url, follow_redirects=False)
    cookie = page.get("/", params={"token": TOKEN}).headers["set-cookie"]
    assert ("Secure" in cookie.split("; ")) is is_secure


def test_a_token_that_was_chosen_is_used_and_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("chosen-by-somebody\n")
    monkeypatch.setenv("TANDEM_WATCH_TOKEN_FILE", str(tmp_path / "token"))
    served: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, **_: served.append(server.config.app))
    assert main(["watch", "--all", str(tmp_path), "--port", "0", "--url", URL]) == 0
    printed = capsys.readouterr().out
    assert f"{URL}/?token=$TANDEM_WATCH_TOKEN" in printed
    assert "chosen-by-somebody" not in printed
    page = TestClient(served[0], base_url=URL)
    assert page.get("/", params={"token": "chosen-by-somebody"}).status_code == 200
    assert TestClient(served[0], base_url=URL).get("/", params={"token": TOKEN}).status_code == 403


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "got no --all and no folder of a run"),
        (["runs/mine", "--all", "runs"], "got --all and the folder of a run"),
        (["--all", "runs/mine"], "Fix: correct the path; for one run: tandem watch runs/mine"),
        (["--all", "runs/mine/metrics.jsonl"], "expected a folder with runs in it"),
        (["--all", "absent/runs"], "expected a folder with runs in it"),
        *(
            (["--all", "runs", "--url", url], "expected http:// or https:// and a host")
            for url in (
                "watch.example.com",
                "http://",
                "ftp://a",
                "http://a/",
                "http://a/b",
                "http://a:b",
                "http://u@a",
            )
        ),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    write_run(tmp_path / "runs/mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("the page is served"))
    assert main(["watch", *words]) == 2
    assert expected in capsys.readouterr().err
