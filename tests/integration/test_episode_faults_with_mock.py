"""Runs in which tools fail in every way, the policy never ends an episode, and the environment server is killed.

Each episode ends as docs/train/episodes.md and docs/train/environment-server.md say, and none ends the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from support.chatml import END, VOCAB, chatml_tokenizer
from support.environment_servers import TOKEN
from support.episode_projects import settings
from support.generators import running
from support.models import make_tiny_model
from support.ports import free_port
from support.projects import Project

MAX_TURNS = 3
TIMEOUT_S = 4
MOST_CHARACTERS = 150
CODE = '''
"""Tools that fail, environments, and a reward."""
import asyncio
import os
import signal
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def raises() -> str:
    """Raise."""
    raise KeyError("the database is gone")


def hangs() -> str:
    """Hang in a thread."""
    time.sleep(1000)


async def waits() -> str:
    """Hang in the event loop."""
    await asyncio.sleep(1000)


def long() -> str:
    """Return 10 MB."""
    return "x" * 10_000_000


def text() -> bytes:
    """Return bytes that are text."""
    return "7 \u20ac".encode()


def binary() -> bytes:
    """Return bytes that are not text."""
    return bytes(range(200, 250))


def nothing() -> None:
    """Return None."""


def double(number: int) -> int:
    """Double a number.

    Args:
        number: the number
    """
    return 2 * number


class World:
    """Has no tools of its own."""

    def reset(self, **columns) -> None:
        pass


class Killed:
    """The process is killed while it answers: never, once, or always as soon as all others are scored."""

    def reset(self, killed: str, **columns) -> None:
        self.killed = killed

    async def step(self, message):
        from tandem_rollout.environments import Done

        if self.killed == "once" and not (FOLDER / "killed").exists():
            (FOLDER / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.killed == "always":
            while not (FOLDER / "scored-in-step-2").exists():
                await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return Done()


def in_order(completions, scored=(None,), **columns):
    """The completions of a row get different rewards, so that there is something to learn."""
    if scored[0]:
        (FOLDER / scored[0]).touch()
    return [float(number) for number, _ in enumerate(completions)]
'''
TOOLS = ["raises", "hangs", "waits", "long", "text", "binary", "nothing", "double"]


class Ends(NamedTuple):
    """How the episodes of a row end."""

    shown: list[tuple[str, str]]
    """What the policy reads between its turns: role and text."""
    turns: int = 2
    tool_calls: int = 1
    tool_errors: int = 0
    status: str = "finished"
    reason: str | None = None


def answered(text: str) -> Ends:
    """The policy reads the answer to its call, and ends the episode."""
    return Ends([("tool", text)])


def error(message: str) -> Ends:
    """The policy reads that its call failed, and ends the episode."""
    return Ends([("tool", json.dumps({"error": message}))], tool_errors=1)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


LATE = f"no answer within {TIMEOUT_S} s"
ROWS: list[tuple[list[str], Ends]] = [
    ([call("hangs"), "ok"], error(LATE)),
    ([call("waits"), "ok"], error(LATE)),
    ([call("raises"), "ok"], error("KeyError: 'the database is gone'")),
    (
        [call("long"), "ok"],
        answered(f"{'x' * MOST_CHARACTERS}… (10000000 characters, of which the first {MOST_CHARACTERS} are shown)"),
    ),
    (
        [call("nothing")] * MAX_TURNS,
        Ends([("tool", "null")] * (MAX_TURNS - 1), turns=MAX_TURNS, tool_calls=MAX_TURNS, status="max_turns"),
    ),
    (["ok"], Ends([], turns=1, tool_calls=0)),
    ([call("nothing"), "ok"], answered("null")),
    ([call("text"), "ok"], answered("7 €")),
    ([call("binary"), "ok"], error("the tool returned 50 bytes that are not text")),
    ([call("double", number="many"), "ok"], error("number: expected a valid integer")),
    ([call("triple", number=2), "ok"], error(f"there is no tool 'triple', only: {', '.join(TOOLS)}")),
    (
        ["<tool_call>double 2</tool_call>", "ok"],
        Ends(
            [("user", "Your tool call cannot be read: Expecting value: line 1 column 1 (char 0)")],
            tool_errors=1,
        ),
    ),
]
"""For each row of the data set, what the policy says, turn by turn, and how that ends."""
PER_STEP = len(ROWS) // 2
STUCK = Ends(
    [],
    turns=1,
    tool_calls=0,
    status="failed",
    reason=f"environment World: hangs: {LATE}, and a thread cannot be stopped, so the state of the environment is "
    "unknown",
)
"""How the first row ends in an environment, whose methods must not run in another thread."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token per byte, so that it can read every error, and with tokens for tool calls."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), vocab=VOCAB, max_position_embeddings=1024)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": END}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chatml_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def made(
    folder: Path, model: Path, rows: Sequence[dict[str, Any]], script: Sequence[dict[str, Any]], **rollout: Any
) -> Iterator[Project]:
    """A project of two steps that takes these rows in order, and a generator that says what the script says."""
    (folder / "script.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in script))
    option = f"--generator.mock.script={folder / 'script.jsonl'}"
    limits = {"num_generations": 2, "max_completion_length": 600, "max_turns": MAX_TURNS}
    trainer: dict[str, Any] = {
        **{"max_steps": 2, "log_completions": 99, "rewards": [{"function": "faults:in_order"}]},
        **settings({"shuffle": False}, num_prompts=len(rows) // 2, **limits, **rollout),
    }
    with running("mock", model, folder / "weights", option, log=folder / "generator.log") as generator:
        project = Project(folder / "project", model, generator, folder / "weights", **trainer)
        (project.directory / "faults.py").write_text(CODE)
        (project.directory / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        yield project


def failures(project: Project) -> list[tuple[int, str]]:
    """Return step and message of each event about failed episodes."""
    events = project.lines("events.jsonl")
    return [(event["step"], event["message"]) for event in events if event["kind"] == "episodes_failed"]


def assert_metrics_say(project: Project, ends: Sequence[Ends]) -> None:
    """The metrics of each step have the sums over its rows, each of which has two episodes."""
    for step, line in enumerate(project.lines("metrics.jsonl")):
        of_step = ends[step * PER_STEP : (step + 1) * PER_STEP]
        assert line["tool_calls"] == 2 * sum(one.tool_calls for one in of_step)
        assert line["tool_errors"] == 2 * sum(one.tool_errors for one in of_step)
        assert line["turns_mean"] == pytest.approx(sum(one.turns for one in of_step) / PER_STEP)
        assert line["truncated_fraction"] == pytest.approx(sum(one.status == "max_turns" for one in of_step) / PER_STEP)
        assert line["episodes_failed"] == 2 * sum(one.status == "failed" for one in of_step)


@pytest.mark.parametrize("environment", [None, "faults:World"], ids=["tools", "environment"])
def test_whatever_a_tool_does_the_policy_reads_it_and_the_run_goes_on(
    tmp_path: Path, model: Path, environment: str | None
) -> None:
    ends = [STUCK if environment else ROWS[0][1], *(end for _, end in ROWS[1:])]
    rows = [{"prompt": f"case {number}="} for number in range(len(ROWS))]
    script = [{**row, "turns": said} for row, (said, _) in zip(rows, ROWS, strict=True)]
    tools = {"tools": [f"faults:{name}" for name in TOOLS], "tool_parser": "hermes", "environment": environment}
    limits = {"tool_timeout_s": TIMEOUT_S, "max_tool_characters": MOST_CHARACTERS}
    with made(tmp_path, model, rows, script, **tools, **limits) as project:
        ended = project.train()
    assert ended.returncode == 0, ended.stderr
    episodes = project.lines("rollouts.jsonl")
    assert sorted((one["step"], one["row"]) for one in episodes) == [
        (1 + row // PER_STEP, row) for row in range(len(rows)) for _ in range(2)
    ]
    for one in episodes:
        shown = [(message["role"], message["content"]) for message in one["messages"] if message["role"] != "assistant"]
        got = Ends(shown[1:], *(one[name] for name in Ends._fields[1:]))
        assert got == ends[one["row"]]
    assert_metrics_say(project, ends)
    reported = [(1, f"2 of {2 * PER_STEP} episodes failed: {STUCK.reason} (2×). They are left out of the update.")]
    assert failures(project) == (reported if environment else [])


@contextmanager
def kept_running(*command: str, **env: str) -> Iterator[None]:
    """Run a program, and start it again whenever it ends, as a container engine does."""
    loop = ["sh", "-c", 'while :; do "$@"; sleep 0.1; done', "sh", *command]
    process = subprocess.Popen(loop, env={**os.environ, **env}, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_environment_server_is_waited_for_and_an_episode_that_loses_it_twice_is_left_out(
    tmp_path: Path, model: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    cases: list[dict[str, Any]] = [
        {"killed": "once", "scored": None},
        {"killed": "never", "scored": None},
        {"killed": "always", "scored": None},
        {"killed": "never", "scored": "scored-in-step-2"},
    ]
    rows = [{"prompt": f"case {number}=", **row} for number, row in enumerate(cases)]
    remote: dict[str, Any] = {"environment": "faults:Killed", "environment_urls": [url]}
    with made(tmp_path, model, rows, [{"turns": ["ok"]}], **remote) as project:
        server = (sys.executable, "-m", "tandem_rollout.server", "--config", str(project.directory / "config.yaml"))
        token: dict[str, Any] = {"TANDEM_ENVIRONMENT_TOKEN": TOKEN}
        with kept_running(*server, f"--trainer.rollout.environment_server.port={url.rpartition(':')[2]}", **token):
            ended = project.train(**token)
    assert ended.returncode == 0, ended.stderr
    assert (project.directory / "killed").exists()
    episodes = project.lines("rollouts.jsonl")
    assert sorted((one["row"], one["step"], one["status"]) for one in episodes) == [
        *[(0, 1, "finished")] * 2,
        *[(1, 1, "finished")] * 2,
        *[(2, 2, "failed")] * 2,
        *[(3, 2, "finished")] * 2,
    ]
    assert [line["episodes_failed"] for line in project.lines("metrics.jsonl")] == [0, 2]
    reasons = [one["reason"] for one in episodes if one["status"] == "failed"]
    assert all(reason.startswith(url) for reason in reasons)
    assert all("cannot be reached" in reason or "has been restarted" in reason for reason in reasons)
    ((step, message),) = failures(project)
    assert (step, message.startswith("2 of 4 episodes failed: ")) == (2, True)
    assert all(reason in message for reason in reasons)
