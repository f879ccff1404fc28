"""What a run writes about itself, for Prometheus: `GET /metrics` with its newest step (`trainer.metrics_port`)."""

from __future__ import annotations

import hmac
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

from .errors import UserError

PREFIX = "tandem_trainer_"
TAIL_BYTES = 1 << 16
"""Longer than any line of `metrics.jsonl`."""


@contextmanager
def exported(run_dir: Path, port: int, token: str | None) -> Iterator[int]:
    """Answer scrapes in the background during the block; wants the services' bearer token. Gives the port.

    Raises:
        UserError: there is no token, or the port is taken.
    """
    if token is None:
        raise UserError(
            f"got trainer.metrics_port {port} without a token; set TANDEM_TOKEN or TANDEM_TOKEN_FILE, as for the "
            "generators, or leave the port out"
        )

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            got = self.headers.get("Authorization", "")
            if self.path != "/metrics":
                return self.send_error(HTTPStatus.NOT_FOUND)
            if not hmac.compare_digest(got.encode(), f"Bearer {token}".encode()):
                return self.send_error(HTTPStatus.UNAUTHORIZED)
            body = exposition(newest(run_dir)).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are no news."""

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
    """The last whole line of `metrics.jsonl`, with the step of `status.json`, which is there before the first line."""
    record: dict[str, Any] = {}
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            *_, last, _ = [b"", *file.read().split(b"\n")]
        record = json.loads(last) if last else {}
        record["step"] = json.loads((run_dir / "status.json").read_text())["step"]
    except FileNotFoundError:
        pass
    return record


def exposition(record: Mapping[str, Any]) -> str:
    """`record` in Prometheus' text format: a gauge a number, and one a mapping with its keys as a label.

    Names are the record's with `_` for what Prometheus does not take: `clip_ratio/low_mean` → `clip_ratio_low_mean`.
    """
    numbers = {name: value for name, value in record.items() if name != "version"}
    gauges = [(PREFIX + re.sub(r"\W", "_", name), _samples(name, value)) for name, value in numbers.items()]
    return "".join(
        f"# TYPE {name} gauge\n" + "".join(f"{name}{labels} {value}\n" for labels, value in samples)
        for name, samples in gauges
        if samples
    )


LABELS = {"rewards": "function", "rewards_std": "function", "timings": "phase"}


def _samples(name: str, value: Any) -> list[tuple[str, float]]:
    items: Iterable[tuple[str, Any]] = [("", value)]
    if isinstance(value, Mapping):
        items = ((f'{{{LABELS.get(name, "key")}="{key}"}}', number) for key, number in value.items())
    return [(labels, number) for labels, number in items if isinstance(number, int | float)]
