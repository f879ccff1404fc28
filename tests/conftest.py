"""Markers for what tests need of the machine. A test is skipped, with the reason, if the machine lacks it.

With `TANDEM_REQUIRE=vllm,docker`, tests with these markers fail instead of being skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import docker
import hypothesis
import pytest
from docker.errors import DockerException

from support import agent_libraries, browser, helm, trl
from support.thorough import THOROUGH

hypothesis.settings.register_profile("untimed", deadline=None)  # tests also run on busy machines
hypothesis.settings.load_profile("untimed")


def _vllm_missing() -> str | None:
    if importlib.util.find_spec("vllm"):
        return None
    return "vLLM's CPU build is not installed; `make clean setup` prints the reason"


@functools.cache
def _docker_missing() -> str | None:
    try:
        docker.from_env(timeout=60).ping()
    except DockerException as error:
        return f"no Docker engine answers: {error}"
    return None


def _podman_missing() -> str | None:
    if not shutil.which("podman"):
        return "podman is not installed"
    return None if os.geteuid() == 0 else "the tests read podman's volumes, which belong to root"


@functools.cache
def _cdi_missing() -> str | None:
    if missing := _docker_missing():
        return missing
    if not docker.from_env(timeout=60).info().get("CDISpecDirs"):
        return "CDI is off in the Docker engine"
    return None if os.geteuid() == 0 else "only root can declare devices to the Docker engine"


def _prometheus_missing() -> str | None:
    if shutil.which("prometheus") and shutil.which("promtool"):
        return None
    return "prometheus and promtool are not installed (Debian's package prometheus)"


def _gpu_missing() -> str | None:
    from support import gpu  # imports torch, which most tests do not need

    return gpu.missing()


NEEDS: dict[str, Callable[[], str | None]] = {
    "vllm": _vllm_missing,
    "docker": _docker_missing,
    "cdi": _cdi_missing,
    "helm": helm.missing,
    "podman": _podman_missing,
    "browser": browser.missing,
    "prometheus": _prometheus_missing,
    "trl": trl.missing,
    "gpu": _gpu_missing,
    "agents": agent_libraries.missing,
}
REQUIRED = frozenset(os.environ.get("TANDEM_REQUIRE", "").replace(",", " ").split())


def pytest_configure() -> None:
    if unknown := REQUIRED - NEEDS.keys():
        raise pytest.UsageError(
            f"TANDEM_REQUIRE names {', '.join(sorted(unknown))}, expected names from this list: {', '.join(NEEDS)}"
        )


@pytest.hookimpl(tryfirst=True)  # before the hook of xdist, which appends the group to the name of a test
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group and order tests for `pytest -n 2 --dist loadgroup --no-loadscope-reorder`.

    Unit tests come first, because some of them look at what their process has imported. Groups with slow tests follow,
    so that one process does not end minutes before the other.
    """
    groups = {item: _group(item) for item in items}
    slow = {group for item, group in groups.items() if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "unit", groups[item] not in slow))
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str:
    """Return the name of the group whose tests run in one process: the test's file, or what more than one file shares.

    Podman's images and the engine's devices belong to the whole machine. The model of `digits` takes a minute to make.
    """
    if shared := next((name for name in ("podman", "cdi") if item.get_closest_marker(name)), None):
        return shared
    return "digits_model" if "digits_model" in getattr(item, "fixturenames", ()) else item.nodeid.split("::")[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("thorough") and not THOROUGH:
        pytest.skip("a further variant of what another test shows; TANDEM_THOROUGH=1 runs it")
    for need, missing in NEEDS.items():
        if item.get_closest_marker(need) and (reason := missing()):
            if need in REQUIRED:
                pytest.fail(f"TANDEM_REQUIRE={need}, but {reason}", pytrace=False)
            pytest.skip(reason)
