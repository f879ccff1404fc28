"""Generator replicas of a compose stack, seen from inside their containers."""

from __future__ import annotations

import time

from docker.models.containers import Container

METRICS = """
import urllib.request as r
token = open("/secrets/token").read()
ask = r.Request("http://127.0.0.1:8000/metrics", headers={"Authorization": f"Bearer {token}"})
print(r.urlopen(ask, timeout=60).read().decode())
"""
CATCH_UP_TIMEOUT_S = 120.0


def metric(replica: Container, name: str) -> float:
    """Read a metric without labels from a replica."""
    code, output = replica.exec_run(["python3", "-c", METRICS])
    assert code == 0, output.decode()
    return next(float(line.split()[1]) for line in output.decode().splitlines() if line.startswith(f"{name} "))


def reach(replica: Container, *, step: float) -> None:
    """Wait until a replica serves step `step`."""
    wait_for(replica, "tandem_weight_step", at_least=step)


def wait_for(replica: Container, name: str, *, at_least: float) -> None:
    """Wait until a metric without labels has a value."""
    deadline = time.monotonic() + CATCH_UP_TIMEOUT_S
    while True:
        try:
            if metric(replica, name) >= at_least:
                return
        except AssertionError:  # the server has not started yet
            pass
        assert time.monotonic() < deadline, (
            f"{name} of {replica.name} did not reach {at_least} within {CATCH_UP_TIMEOUT_S} s"
        )
        time.sleep(0.2)
