"""`tandem watch` answers only who has the token, only reads, and says what is wrong with its command line."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tandem_cli.__main__ import main
from tandem_cli.watch.command import address, listen
from tandem_cli.watch.guard import POLICY, Guard
from tandem_cli.watch.runs import find_runs
from tandem_cli.watch.server import make_app

TOKEN = "secret"
ADDRESSES = ("/", "/main.js", "/plotly/plotly.min.js", "/api/runs", "/api/runs/0/steps", "/absent")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs/mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n{"step": 2, "reward_mean": NaN}\n')
    (folder / "rollouts.jsonl").write_text('{"step": 1, "completion": "\\ud800", "a": 1e999}\n')
    (folder / "status.json").write_text('{"phase": "update", "step": 2, "version": "2.1", "since_unix_s": 0}')
    (folder / "config.resolved").write_text(
        "trainer.max_lag   1  # default\ntrainer.max_steps          40  # config.yaml\n"
    )
    return folder


def client(folder: Path, *, has_cookie: bool = True, host: str = "127.0.0.1:8600") -> TestClient:
    app = make_app(find_runs([folder]), TOKEN, "127.0.0.1")
    made = TestClient(app, base_url=f"http://{host}", follow_redirects=False, raise_server_exceptions=False)
    if has_cookie:
        made.get("/", params={"token": TOKEN})
    return made


@pytest.mark.parametrize("path", ADDRESSES)
def test_nothing_is_answered_without_the_token(run_dir: Path, path: str) -> None:
    stranger = client(run_dir, has_cookie=False)
    assert stranger.get(path).status_code == 403
    assert stranger.get(path, params={"token": "wrong"}).status_code == 403
    stranger.get("/", params={"token": TOKEN})
    assert stranger.get(path).status_code != 403
    for name in list(stranger.cookies):
        stranger.cookies.set(name, "wrong", domain="127.0.0.1")
    assert stranger.get(path).status_code == 403


def test_the_token_in_the_address_becomes_a_cookie_that_scripts_cannot_read(run_dir: Path) -> None:
    answer = client(run_dir, has_cookie=False).get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=lax"} <= set(answer.headers["set-cookie"].split("; "))
    assert client(run_dir).get("/").status_code == 200


def test_two_pages_of_a_host_do_not_log_each_other_out(run_dir: Path) -> None:
    """Their ports are the same where they run, and different where they are forwarded to."""
    one, other = client(run_dir), client(run_dir)
    other.cookies.update(one.cookies)
    one.cookies.update(other.cookies)
    assert (one.get("/").status_code, other.get("/").status_code) == (200, 200)
    assert len(one.cookies) == 2


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize("has_cookie", [True, False])
def test_every_answer_has_the_policy(run_dir: Path, path: str, has_cookie: bool) -> None:
    headers = client(run_dir, has_cookie=has_cookie).get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert not {"unsafe-inline", "unsafe-eval", "*", "http:", "https:"} & set(POLICY.replace("'", "").split())


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_only_get_is_answered(run_dir: Path, method: str) -> None:
    assert client(run_dir).request(method, "/api/runs").status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8600", 200),
        ("localhost:8600", 200),
        ("LOCALHOST", 200),
        ("[::1]:8600", 200),
        ("192.168.1.5:8600", 200),
        (socket.gethostname(), 200),
        ("evil.example:8600", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@127.0.0.1", 200),  # the name is 127.0.0.1
        ("127.0.0.1@evil.example", 403),
        ("localhost.", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_name_that_is_not_of_this_machine_is_refused(run_dir: Path, host: str, status: int) -> None:
    assert Guard(TOKEN, "127.0.0.1").is_own_name(host) == (status == 200)
    assert client(run_dir).get("/api/runs", headers={"host": host}).status_code == status


def test_the_state_of_a_run_and_its_data_are_json_whatever_is_in_its_files(run_dir: Path) -> None:
    browser = client(run_dir)
    (state,) = browser.get("/api/runs").json()
    assert (state["name"], state["phase"], state["step"], state["max_steps"]) == ("mine", "update", 2, 40)
    assert browser.get("/api/runs/0/steps").json()["columns"]["reward_mean"]["mean"] == [0.5, None]
    (row,) = browser.get("/api/runs/0/steps/1/rollouts").json()["rows"]
    assert browser.get(f"/api/runs/0/rollouts/{row['at']}").json() == {"step": 1, "completion": "\ud800", "a": None}
    assert browser.get("/api/runs/0/rollouts/3").status_code == 409
    assert browser.get("/api/runs/1/steps").status_code == 404
    assert browser.get("/api/runs/0/search", params={"min_reward": "x"}).status_code == 422
    for folder in ("..", "%2e%2e", "..%2f.."):
        assert browser.get(f"/{folder}/server.py").status_code == 404


def test_plotly_js_is_that_of_the_package_and_is_loaded_once(run_dir: Path) -> None:
    browser = client(run_dir)
    script = browser.get("/plotly/plotly.min.js")
    assert "plotly.js" in script.text[:200]
    again = browser.get("/plotly/plotly.min.js", headers={"if-none-match": script.headers["etag"]})
    assert again.status_code == 304


def test_reading_a_run_writes_nothing_into_its_folder(run_dir: Path) -> None:
    def files() -> list[tuple[str, int, int]]:
        return sorted((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in (run_dir, *run_dir.iterdir()))

    before, browser = files(), client(run_dir)
    for path in ("steps", "evaluations", "events", "steps/1/rollouts", "rollouts/0", "search?text=a"):
        assert browser.get(f"/api/runs/0/{path}").status_code == 200
    assert files() == before


def test_a_run_that_has_not_started_is_shown_once_it_does(tmp_path: Path) -> None:
    browser = client(tmp_path / "mine")
    assert [state["exists"] for state in browser.get("/api/runs").json()] == [False]
    for path in ("steps", "evaluations", "events", "steps/1/rollouts", "search?text=a"):
        assert browser.get(f"/api/runs/0/{path}").status_code == 200
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.jsonl").write_text(json.dumps({"step": 7, "max_steps": 9}) + "\n")
    (state,) = browser.get("/api/runs").json()
    assert (state["exists"], state["step"], state["max_steps"]) == (True, 7, 9)


def test_runs_of_the_same_name_are_called_by_their_paths(tmp_path: Path) -> None:
    folders = [tmp_path / name / "runs/mine" for name in ("a", "b")]
    for folder in folders:
        folder.parent.mkdir(parents=True)
    assert [run.name for run in find_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runs"], "a folder with 1 runs in it"),
        (["."], "Fix: tandem watch runs/mine"),
        (["runs/mine/metrics.jsonl"], "a file, expected the folder of a run. Fix: tandem watch runs/mine"),
        (["absent/runs/mine"], "the folder absent/runs does not exist"),
        (["runs/mine", "--port", "99999"], "--port 99999, which cannot be used"),
        (["runs/mine", "--host", "a..b"], "--host a..b"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(run_dir.parents[1])
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("the page is served"))
    assert main(["watch", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_port_that_is_in_use_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address(listener) == f"http://127.0.0.1:{port}"
        assert main(["watch", str(run_dir), "--port", str(port)]) == 2
    assert "in use" in capsys.readouterr().err
