"""A pod's probes, sent from its node as kubelet does."""

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
"""Between two probes; kubelet leaves seconds, in which a short failure hides."""


def passes(pod: Pod, kind: str, address: str) -> bool:
    """Send one probe of a pod."""
    probe: Object = pod.container[kind]
    get = probe["httpGet"]
    url = f"http://{address}:{pod.port(get['port'])}{get['path']}"
    try:
        with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as answer:  # follows redirects, as kubelet
            return bool(answer.status < 400)
    except OSError:  # HTTPError and URLError are
        return False


def pass_in_time(pod: Pod, kind: str, address: str) -> bool:
    """Wait until a probe passes, for no longer than the startup probe lets a pod be without it."""
    startup = pod.container["startupProbe"]
    deadline = time.monotonic() + startup["periodSeconds"] * startup["failureThreshold"]
    while time.monotonic() < deadline:
        if passes(pod, kind, address):
            return True
        time.sleep(PERIOD_S)
    return False


@dataclass
class Answers:
    """What a pod's probes were answered, in order."""

    ready: list[bool] = field(default_factory=list)
    alive: list[bool] = field(default_factory=list)


@contextmanager
def probed(pod: Pod, address: str) -> Iterator[Answers]:
    """Send readiness and liveness probes for as long as the block lasts."""
    answers, stop = Answers(), threading.Event()

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
