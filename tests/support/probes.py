"""Send a pod's probes from its node, as the kubelet does."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from support.helm import Object
from support.pods import Pod

PERIOD_S = 0.1
"""Seconds between two probes. The kubelet waits longer and would miss short failures."""


def passes(pod: Pod, kind: str, address: str) -> bool:
    """Send one probe, and return whether it passed."""
    probe: Object = pod.container[kind]
    get = probe["httpGet"]
    url = f"http://{address}:{pod.port(get['port'])}{get['path']}"
    try:
        with urllib.request.urlopen(
            url, timeout=probe["timeoutSeconds"]
        ) as answer:  # follows redirects, as the kubelet does
            return bool(answer.status < 400)
    except OSError:  # includes HTTPError and URLError
        return False


def pass_in_time(pod: Pod, kind: str, address: str) -> bool:
    """Wait until a probe passes, at most for the time that the startup probe allows."""
    startup = pod.container["startupProbe"]
    deadline = time.monotonic() + startup["periodSeconds"] * startup["failureThreshold"]
    while time.monotonic() < deadline:
        if passes(pod, kind, address):
            return True
        time.sleep(PERIOD_S)
    return False


@dataclass
class Answers:
    """The results of a pod's probes, in order."""

    ready: list[bool] = field(default_factory=list)
    alive: list[bool] = field(default_factory=list)


@contextmanager
def probed(pod: Pod, address: str) -> Iterator[Answers]:
    """Send readiness and liveness probes until the end of the `with` block."""
    answers = Answers()
    stop = threading.Event()

    def probe() -> None:
        while not stop.wait(PERIOD_S):
            answers.ready.append(passes(pod, "readinessProbe", address))
            answers.alive.append(passes(pod, "livenessProbe", address))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
