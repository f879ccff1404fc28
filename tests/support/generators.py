"""Real generator processes, with the mock or vLLM, and a client for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from support.ports import free_port, is_free
from tandem_protocol.messages import Group, Prompt, RolloutLine, RolloutRequest, Sampling, ServedWeights, SwitchMode
from tandem_protocol.version import Version

TOKEN = "a-token-for-tests"
START_TIMEOUT_S = 180.0
SAMPLING_TIMEOUT_S = 60.0
PORT_TIMEOUT_S = 20.0
_VLLM_ARGUMENTS = ["--enforce-eager", "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "64"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TANDEM_TOKEN": TOKEN}


def spawn(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in its own session. Its output replaces the content of `log`."""
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            env=os.environ | ENV,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class NoRollouts(AssertionError):
    """The generator refused to sample, or failed in the middle of it."""


class Generator:
    """A generator process, and an HTTP client with its token."""

    def __init__(
        self,
        engine: str,
        model: Path | str,
        weights_dir: Path,
        *arguments: str,
        log: Path,
        port: int | None = None,
        program: Sequence[str] = ("-m", "tandem_generator"),
        spawn: Callable[[Sequence[str], Path], Any] = spawn,
    ) -> None:
        self.port = port or free_port()
        self.log = log
        command = [sys.executable, *program, "--engine", engine, "--model", str(model)]
        command += ["--port", str(self.port), "--weights-dir", str(weights_dir)]
        command += _VLLM_ARGUMENTS if engine == "vllm" else []
        self.process = spawn([*command, *arguments], log)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120
        )

    def wait_ready(self) -> Generator:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}"
            with suppress(httpx.TransportError):
                if self.client.get("/readyz").status_code == 200:
                    return self
            time.sleep(0.1)
        raise TimeoutError(f"not ready after {START_TIMEOUT_S} s:\n{self.log.read_text()[-3000:]}")

    def rollouts(self, *prompts: Prompt, **sampling: object) -> list[Group]:
        """Request rollouts, and return the groups in the order of their prompts."""
        request = RolloutRequest(prompts=prompts, sampling=Sampling.model_validate(sampling))
        response = self.client.post("/rollouts", json=request.model_dump(mode="json"))
        lines = [RolloutLine.model_validate_json(line) for line in response.text.splitlines() if response.is_success]
        if response.is_error or any(line.error for line in lines):
            raise NoRollouts(response.text)
        return sorted((line.group for line in lines if line.group), key=lambda group: group.prompt_index)

    def put(self, version: Version, digest: str, mode: SwitchMode = SwitchMode.DRAIN) -> httpx.Response:
        return self.client.put(f"/weights/{version}", json={"manifest_digest": digest, "mode": mode})

    def wait_until_running(self, requests: int) -> None:
        """Wait until vLLM decodes this many requests at the same time."""
        for _ in range(2000):
            if self._metric("vllm:num_requests_running") >= requests:
                return
        raise AssertionError(f"{requests} requests never ran at once")

    @property
    def sampled_tokens(self) -> int:
        """How many tokens vLLM has sampled since it started."""
        return int(self._metric("vllm:generation_tokens_total"))

    def wait_until_sampled(self, tokens: int) -> None:
        """Wait until vLLM has sampled this many tokens since it started."""
        deadline = time.monotonic() + SAMPLING_TIMEOUT_S
        while self.sampled_tokens < tokens:
            assert time.monotonic() < deadline, f"vLLM never sampled {tokens} tokens"

    def _metric(self, name: str) -> float:
        """Return the value of a metric of vLLM. 0 if it is not there yet."""
        lines = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
        return float(lines[0].split()[-1]) if lines else 0.0

    @property
    def is_sampling(self) -> bool:
        """Whether a request for rollouts is running."""
        return "tandem_requests_running 1.0" in self.client.get("/metrics").text

    @property
    def served(self) -> ServedWeights:
        return ServedWeights.model_validate(self.client.get("/weights").json())

    def stop(self) -> int:
        """Stop the process as a supervisor would, and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all of its processes, and wait until their port is free. They die one after another."""
        runs = self.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + PORT_TIMEOUT_S
        while runs and not is_free(self.port):  # if it ended before, another one may have the port
            assert time.monotonic() < deadline, f"port {self.port} is in use {PORT_TIMEOUT_S} s after the kill"
            time.sleep(0.02)


@contextmanager
def running(
    engine: str,
    model: Path | str,
    weights_dir: Path,
    *arguments: str,
    log: Path,
    port: int | None = None,
    forks: bool = True,
) -> Iterator[Generator]:
    """Start a generator and wait until it is ready. Stop it with all its processes at the end of the block.

    Args:
        forks: Whether vLLM is forked, which saves most of its start. False for tests of the start.
    """
    from support import forked_vllm  # it uses this module

    start = forked_vllm.spawn if engine == "vllm" and forks else spawn
    generator = Generator(engine, model, weights_dir, *arguments, log=log, port=port, spawn=start)
    try:
        yield generator.wait_ready()
    finally:
        generator.stop()
        generator.client.close()
