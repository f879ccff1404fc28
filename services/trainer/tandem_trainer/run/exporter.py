"""Serve the metrics of a run's newest step to Prometheus: `GET /metrics` on `trainer.metrics_port`."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tandem_protocol import ports
from tandem_protocol.config import is_authorized
from tandem_rollout.errors import UserError

PREFIX = "tandem_trainer_"
LABELS = {
    "rewards": "function", "rewards_std": "function", "timings": "phase", "publish_timings": "phase",
    "staleness": "versions", "replica_tokens": "replica", "replica_outstanding": "replica",
    "rewards_none_fraction": "function", "alerts": "name",
}  # fmt: skip
"""Field of the record that is an object → the label for its keys."""
TAIL_BYTES = 1 << 16
"""Number of bytes to read at the end of `metrics.jsonl`. More than any of its lines has."""


@contextmanager
def exported(run_dir: Path, port: int, token: str | None, bounds: Mapping[str, float] | None = None) -> Iterator[int]:
    """Answer scrapes in a background thread during the block, and yield the port.

    `bounds` are settings of the run that alerts compare its metrics with. They become gauges too.

    A scrape must send the bearer token of the services.

    Raises:
        UserError: the token is missing, or the port is in use.
    """
    if token is None:
        raise UserError(
            f"trainer.metrics_port is {port}, but no token is set. Fix: set TANDEM_TOKEN or TANDEM_TOKEN_FILE, as "
            "for the generators, or remove trainer.metrics_port."
        )

    secret = token  # not None here, which mypy does not see inside of the class

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            got = self.headers.get("Authorization", "")
            if self.path != "/metrics":
                return self.send_error(HTTPStatus.NOT_FOUND)
            if not is_authorized(got, secret):
                return self.send_error(HTTPStatus.UNAUTHORIZED)
            body = exposition({**newest(run_dir), **(bounds or {})}).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Do not log scrapes."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise UserError(ports.problem(error, "", port, "trainer.metrics_port")) from error
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def newest(run_dir: Path) -> dict[str, Any]:
    """Return the last complete line of `metrics.jsonl`, with the current step.

    The step comes from `status.json`, because that file is updated before `metrics.jsonl`.
    """
    record: dict[str, Any] = {}
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is an incomplete line
        if lines and lines[-1]:
            record = json.loads(lines[-1])
        record["step"] = json.loads((run_dir / "status.json").read_text())["step"]
    except FileNotFoundError:
        pass
    return record


def exposition(record: Mapping[str, Any]) -> str:
    """Return `record` in the text format of Prometheus.

    Each number becomes a gauge. Each object becomes a gauge with a label for its keys. A character that Prometheus
    does not allow in a name becomes `_`: `clip_ratio/low_mean` becomes `tandem_trainer_clip_ratio_low_mean`.
    """
    lines: list[str] = []
    for name, value in record.items():
        samples = _samples(name, value) if name != "version" else []
        if samples:
            gauge = PREFIX + re.sub(r"\W", "_", name)
            lines.append(f"# TYPE {gauge} gauge\n")
            lines.extend(f"{gauge}{labels} {number}\n" for labels, number in samples)
    return "".join(lines)


def _samples(name: str, value: Any) -> list[tuple[str, float]]:
    """Return the labels and the number of each sample of a gauge. Values that are not numbers are left out."""
    items: Iterable[tuple[str, Any]] = [("", value)]
    if isinstance(value, Mapping):
        label = LABELS.get(name, "key")
        items = ((f'{{{label}="{key}"}}', number) for key, number in value.items())
    return [(labels, number) for labels, number in items if isinstance(number, int | float)]
