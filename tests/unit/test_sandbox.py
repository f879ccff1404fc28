"""A sandboxed reward runs in its own process, which is killed at its deadline, restarted, and gets no credentials."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.models import make_tokenizer
from support.rollouts import completion, read
from tandem_protocol.config.rollout import RewardConfig
from tandem_rollout.errors import UserError
from tandem_rollout.functions import CallFailed
from tandem_rollout.prompts import PromptRow
from tandem_rollout.rewards.sandbox import Sandbox
from tandem_rollout.rewards.scoring import Rewards

MODULE = '''
import asyncio, os, socket, subprocess, sys, time

def run(code, completions, **_):
    """Execute the column `code`, which stands for untrusted code."""
    scope = {"os": os, "sys": sys, "time": time, "socket": socket, "subprocess": subprocess}
    exec(code[0], scope)
    return scope.get("rewards", [1.0] * len(completions))

async def later(completions, bonus, **_):
    await asyncio.sleep(0)
    print("said")
    return [bonus + len(text) for text in completions]
'''
HANG = "while True: time.sleep(1)"

MakeSandbox = Callable[..., Sandbox]


@pytest.fixture
async def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeSandbox]:
    (tmp_path / "untrusted.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    made: list[Sandbox] = []

    def make(function: str = "run", *, timeout_s: float = 60, **arguments: Any) -> Sandbox:
        made.append(Sandbox(f"untrusted:{function}", arguments, timeout_s=timeout_s))
        return made[-1]

    yield make
    for one in made:
        await one.close()
    sys.modules.pop("untrusted", None)


async def _run(sandbox: Sandbox, code: str) -> Any:
    return await sandbox({"code": [code], "completions": ["ab"]})


async def test_sandbox_returns_the_functions_results(sandbox: MakeSandbox):
    later = sandbox("later", bonus=0.5)
    assert await later({"completions": ["ab", "c"]}) == [2.5, 1.5]
    run = sandbox()
    await _run(run, "sys.calls = 1")
    assert await _run(run, "rewards = [sys.calls]") == [1.0]


async def test_sandbox_is_killed_with_its_children_at_the_deadline_and_restarted(sandbox: MakeSandbox):
    run = sandbox(timeout_s=5)
    sleep = ["sleep", f"1000.{os.getpid()}"]  # of this test only
    (pid,) = await _run(run, "rewards = [os.getpid()]")
    process = psutil.Process(int(pid))
    with pytest.raises(CallFailed, match="no answer within 5 s; its sandbox was killed"):
        await _run(run, f"subprocess.Popen({sleep})\n{HANG}")
    gone, _ = psutil.wait_procs([process], timeout=30)
    assert gone
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == sleep]
    (next_pid,) = await _run(run, "rewards = [os.getpid()]")
    assert next_pid != pid


async def test_sandbox_gets_no_token_and_no_other_variable_of_the_trainer(
    sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch
):
    for name in ("TANDEM_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "secret")
    assert await _run(sandbox(), "rewards = [float('secret' in os.environ.values())]") == [0.0]


async def test_memory_of_the_sandbox_is_limited(sandbox: MakeSandbox):
    with pytest.raises(CallFailed, match="MemoryError"):
        await _run(sandbox(), "bytearray(5 << 30)")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os._exit(3)", "ended with exit code 3"),
        ("raise KeyError('answer')", r"KeyError: 'answer' \(<string>:1\), in its sandbox"),
        ("rewards = [float('nan')]", "expected a finite number"),
        ("sys.exit('enough')", "SystemExit: enough"),
        ("os.write(4, b'[1.0]\\n')", "its sandbox answered"),
    ],
)
async def test_failure_in_the_sandbox_is_reported_and_the_next_call_works(sandbox: MakeSandbox, code: str, words: str):
    run = sandbox()
    with pytest.raises(CallFailed, match=words):
        await _run(run, code)
    assert await _run(run, "") == [1.0]


async def test_cancelled_call_leaves_no_answer_for_the_next(sandbox: MakeSandbox):
    run = sandbox()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await _run(run, f"rewards = [7.0]\n{HANG}")
    assert await _run(run, "rewards = [8.0]") == [8.0]


async def test_sandbox_ends_with_its_trainer(sandbox: MakeSandbox, tmp_path: Path):
    program = f"""
import asyncio
from tandem_rollout.rewards.sandbox import Sandbox
async def main():
    run = Sandbox("untrusted:run", {{}}, timeout_s=60)
    print(int((await run({{"code": ["rewards = [os.getpid()]"], "completions": [""]}}))[0]), flush=True)
    await run({{"code": [{HANG!r}], "completions": [""]}})
asyncio.run(main())
"""
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert trainer.stdout is not None
    inside = psutil.Process(int(await asyncio.wait_for(trainer.stdout.readline(), 60)))
    trainer.kill()
    await trainer.wait()
    assert psutil.wait_procs([inside], timeout=30)[0]


@pytest.mark.usefixtures("sandbox")
async def test_configured_reward_runs_in_a_sandbox_and_a_late_result_is_dropped():
    tokenizer = make_tokenizer(80)
    row = PromptRow(7, "prompts.jsonl row 7", "a", "a", (40,), {"code": "rewards = [os.getpid()]"})
    hung = PromptRow(8, "prompts.jsonl row 8", "a", "a", (40,), {"code": HANG})
    config = RewardConfig(function="untrusted:run", sandbox=True, timeout_s=3)

    async def score(row: PromptRow, *, drop: bool) -> float | None:
        rewards = Rewards([config], drop_errors=drop, timeout_s=60)
        try:
            return (await rewards.score(row, read(tokenizer, row, [completion([5])])))[0].reward
        finally:
            await rewards.close()

    assert await score(row, drop=False) not in (None, float(os.getpid()))
    assert await score(hung, drop=True) is None
    with pytest.raises(UserError, match=r"untrusted:run on prompts.jsonl row 8: no answer within 3 s; its sandbox"):
        await score(hung, drop=False)


async def test_sandbox_has_no_network_or_the_trainer_is_warned(sandbox: MakeSandbox, caplog: pytest.LogCaptureFixture):
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()
        (error,) = await _run(sandbox(), f"rewards = [socket.socket().connect_ex({address!r})]")
    assert (error == 0) == ("shares the trainer's network" in caplog.text)
