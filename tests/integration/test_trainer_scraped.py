"""A running trainer exports the metrics that the alerts and the dashboard use."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.generators import TOKEN
from support.ports import free_port
from support.series import STEP


def test_a_running_trainer_exports_every_metric_that_is_watched(make_project: Any) -> None:
    port = free_port()
    project = make_project(max_steps=20, metrics_port=port)
    seen: set[str] = set()
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(project.train)
        while not ended.done() and "tandem_trainer_timings" not in seen:
            with contextlib.suppress(httpx.TransportError):
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
                seen = {family.name for family in text_string_to_metric_families(text)}
            time.sleep(0.05)
    assert ended.result().returncode == 0, ended.result().stderr
    assert {f"tandem_trainer_{name}" for name in STEP} <= seen
