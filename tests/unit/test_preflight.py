"""The preflight finds mistakes, retries what may pass, and says which of the two it was with its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.projects import write_project

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import hub, preflight
hub.FIRST_PAUSE_S, hub.RETRY_FOR_S = 0.01, float(sys.argv[2])
sys.exit(preflight.main())
"""
SHA = "0" * 40


class Answers(BaseHTTPRequestHandler):
    """A hub with the answers that the test sets: the statuses of the first requests; after those, it has a model."""

    statuses: list[int | None]
    """None: close the connection without an answer."""
    asked: list[str]
    files: dict[str, bytes]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status = self.statuses.pop(0) if self.statuses else 200
        if status is None:
            self.close_connection = True
            return
        body: bytes = b"{}"
        if status == 200 and "/tree/" in self.path:
            body = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": name.replace(".", "-")}
                    for name, data in self.files.items()
                ]
            ).encode()
        elif status == 200 and self.path.startswith("/api"):
            body = json.dumps({"id": "org/m", "sha": SHA, "siblings": [], "private": False, "tags": []}).encode()
        elif status == 200:
            body = self.files[self.path.rpartition("/")[2]]
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)), "ETag": f'"{self.path.rpartition("/")[2].replace(".", "-")}"',
            "X-Repo-Commit": SHA, **({"X-Error-Code": "GatedRepo"} if status == 403 else {}),
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub(*statuses: int | None, files: dict[str, bytes] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve a hub. Yields its address, and the list of the requested paths."""
    asked: list[str] = []
    kind = type("Hub", (Answers,), {"statuses": [*statuses], "asked": asked, "files": files or {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_project(tmp_path / "source")


def change(source: Path, **keys: Any) -> None:
    """Set keys of config.yaml, such as `trainer__max_steps=1`."""
    file = source / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for key, value in keys.items():
        *sections, name = key.split("__")
        section = config
        for word in sections:
            section = section[word]
        section[name] = value
    file.write_text(yaml.safe_dump(config))


def model_files(source: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (source / "model").iterdir()}


def preflight(source: Path, *, retry_for_s: float = 0.05, **env: str) -> subprocess.CompletedProcess[str]:
    folder = source.parent
    own = {
        "TANDEM_PROJECT_SOURCES": str(source), "TANDEM_PROJECT_DIR": str(folder / "project"),
        "HF_HOME": str(folder / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "docker"), str(retry_for_s)],
        env={**os.environ, **own, **env}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_hiccup_of_the_hub_is_retried_and_each_wait_is_logged_with_its_end(source: Path) -> None:
    change(source, shared__model="org/m")
    files = model_files(source)
    with hub(503, None, 429, 500, files=files) as (url, asked):
        done = preflight(source, retry_for_s=30, HF_ENDPOINT=url)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("downloading org/m failed: ") >= 3
    assert "Trying again in 0 s, until " in done.stderr
    snapshot = source.parent / f"cache/hub/models--org--m/snapshots/{SHA}"
    assert {path.name for path in snapshot.iterdir()} == set(files)
    assert len(asked) > 6


@pytest.mark.parametrize("statuses", [[503] * 1000, [429] * 1000, [None] * 1000])
def test_a_hub_that_fails_for_good_does_not_end_with_the_status_of_a_mistake(
    source: Path, statuses: list[int | None]
) -> None:
    change(source, shared__model="org/m")
    with hub(*statuses) as (url, asked):
        done = preflight(source, HF_ENDPOINT=url)
    assert done.returncode == 1, done.stderr
    assert "Fix: check the name, this machine's network" in done.stderr.splitlines()[-1]
    assert len(asked) >= 2


def test_a_hub_that_cannot_be_connected_to_is_not_a_mistake(source: Path) -> None:
    change(source, shared__model="org/m")
    assert preflight(source).returncode == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_answer_that_a_retry_would_not_change_is_a_mistake_at_once(source: Path, status: int) -> None:
    change(source, shared__model="org/m")
    with hub(*[status] * 1000) as (url, asked):
        done = preflight(source, HF_ENDPOINT=url)
    assert done.returncode == 2, done.stderr
    assert "Trying again" not in done.stderr
    assert "shared.model: got 'org/m'" in done.stderr
    assert len(asked) <= 2


def test_a_name_that_the_hub_cannot_have_is_a_mistake(source: Path) -> None:
    change(source, shared__model="models/mine/deep")
    assert preflight(source).returncode == 2


def test_a_model_in_the_cache_needs_no_hub(source: Path) -> None:
    change(source, shared__model="org/m")
    with hub(files=model_files(source)) as (url, _):
        assert preflight(source, HF_ENDPOINT=url).returncode == 0
    done = preflight(source, HF_ENDPOINT=url)
    assert done.returncode == 0, done.stderr
    assert "Trying again" not in done.stderr


def test_the_inputs_are_checked_before_a_long_download(source: Path) -> None:
    change(source, shared__model="org/m", trainer__rewards=[{"function": "odd_rewards:absent"}])
    with hub(files=model_files(source)) as (url, asked):
        done = preflight(source, HF_ENDPOINT=url)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.splitlines()[-1].partition("ERROR    ")[2].startswith("reward function odd_rewards:absent: module")
    )
    assert not any("model.safetensors" in path for path in asked)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainer__max_stepss": 1}, "unknown configuration key 'trainer.max_stepss'"),
        ({"generator__mox": 1}, "unknown configuration key 'generator.mox'"),
        ({"generator__vllm": {"host": "x"}}, "got the option host for vLLM"),
        ({"generator__tensor_parallel_size": 0}, "generator.tensor_parallel_size"),
        ({"generator__max_model_len": 12}, "trainer.rollout.max_completion_length, which is 12"),
        ({"trainer__rollout__num_prompts": 3}, "num_prompts is 3 for 2 trainer processes"),
        ({"shared__mdel": "x"}, "unknown configuration key 'shared.mdel'"),
    ],
)
def test_a_mistake_in_any_section_is_found_before_prepare_runs(
    source: Path, keys: dict[str, Any], message: str
) -> None:
    change(source, **keys)
    (source / "prepare.py").write_text("print('prepare runs')")
    done = preflight(source, TANDEM_TRAINER_PROCESSES="2")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "prepare runs" not in done.stdout


def test_a_damaged_model_is_found(source: Path) -> None:
    (source / "model/model.safetensors").write_bytes(b"half")
    done = preflight(source)
    assert done.returncode == 2
    assert "not a complete safetensors file" in done.stderr


@pytest.mark.parametrize(("code", "status"), [("sys.exit(3)", 3), ("sys.exit(2)", 2), ("1 / 0", 1)])
def test_the_status_of_prepare_is_that_of_the_preflight_and_its_last_lines_are_in_the_message(
    source: Path, code: str, status: int
) -> None:
    (source / "prepare.py").write_text(f"import sys\nfor i in range(100): print('line', i)\n{code}\n")
    done = preflight(source)
    assert done.returncode == status
    assert "line 0\n" in done.stdout
    error = done.stderr.partition("ERROR    ")[2]
    assert error.startswith(f"prepare.py ended with exit status {status}. Its last lines:\n")
    assert "line 99\n" in error
    assert "line 5\n" not in error


# -- who reports it ----------------------------------------------------------------------------------------------------


def test_under_compose_a_failure_is_handed_to_the_trainer_and_forgotten_at_the_next_start(source: Path) -> None:
    file = source.parent / "failure"
    change(source, generator__mox=1)
    done = preflight(source, TANDEM_PREFLIGHT_FILE=str(file), TANDEM_LOG="json")
    assert done.returncode == 0
    failure = json.loads(file.read_text())
    assert failure["status"] == 2
    assert "generator.mox" in failure["message"]
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["message"]) == ("error", failure["message"])
    change(source, generator={"engine": "mock"})
    done = preflight(source, TANDEM_PREFLIGHT_FILE=str(file))
    assert done.returncode == 0, done.stderr
    assert not file.exists()


def test_a_failure_that_cannot_be_handed_over_is_the_exit_status(source: Path) -> None:
    change(source, generator__mox=1)
    assert preflight(source, TANDEM_PREFLIGHT_FILE=str(source / "absent/failure")).returncode == 2
