"""The commands that helm prints after an install name the rendered objects and work at once."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.blocks import commands
from support.chart_rules import pods, quantity
from support.helm import CHART, helm, of_kind, one, render
from support.variations import CI, VARIATIONS, Values

pytestmark = pytest.mark.helm

KIND_CPU = 2 - 0.95
"""Cores that kind's own pods leave of two: they request 950m."""
KIND_MEMORY = (8 - 0.5) * 2**30


def notes(values: Values | None = None) -> str:
    made = helm(
        "install",
        "run",
        CHART,
        "--namespace",
        "rl",
        "--dry-run=client",
        "--values",
        "-",
        stdin=json.dumps(values or {}),
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.partition("NOTES:")[2]


def printed(values: Values | None = None) -> list[list[str]]:
    """Return the commands of the notes, as words."""
    lines = re.findall(r"(?m)^ +((?:kubectl|helm) .*)$", notes(values))
    return [command.words for line in lines for command in commands(line.replace("…", "a=b"))]


@pytest.mark.parametrize("name", ["defaults", "nodes-shared-plain-files", "multinode", "gpu"])
def test_the_first_command_waits_for_what_the_next_ones_need(name: str) -> None:
    values = next(v for key, v in VARIATIONS.items() if key.startswith(name.rsplit("-", 1)[0]))
    objects, (wait, logs, tail, *_) = render(values), printed(values)
    job = one(objects, "JobSet" if of_kind(objects, "JobSet") else "Job")
    kind, name = job["kind"].lower(), job["metadata"]["name"]
    assert wait[:5] == ["kubectl", "-n", "rl", "wait", f"{kind}/{name}"]
    if kind == "job":
        assert f"--for=jsonpath={{.status.ready}}={job['spec']['completions']}" in wait
        made = name
    else:
        (nodes,) = job["spec"]["replicatedJobs"]
        assert "--for=jsonpath={.status.replicatedJobsStatus[0].ready}=1" in wait
        made = f"{name}-{nodes['name']}-0"
    assert logs == ["kubectl", "-n", "rl", "logs", "-f", f"job/{made}", "--all-containers"]
    assert tail[4:7] == [f"job/{made}", "-c", "trainer"]
    assert tail[8:12] == ["tail", "-n", "+1", "-F"], "-F waits for a file that does not exist yet"


def test_the_notes_wait_for_the_end_of_an_uninstall() -> None:
    (uninstall,) = [words for words in printed() if words[:2] == ["helm", "uninstall"]]
    assert "--wait" in uninstall
    (test,) = [words for words in printed() if words[:2] == ["helm", "test"]]
    assert "--logs" in test


@pytest.mark.parametrize("name", ["cpu", "mock"])
def test_the_demo_fits_on_a_kind_cluster_with_two_cores(name: str) -> None:
    total: dict[str, float] = {"cpu": 0, "memory": 0}
    for _, template in pods(render(CI[name])):
        for resource in total:
            total[resource] += requested(template["spec"], resource)
    assert total["cpu"] <= KIND_CPU
    assert total["memory"] <= KIND_MEMORY


def requested(spec: dict[str, Any], name: str) -> float:
    """Return what the scheduler reserves for a pod: the sum of its containers, or its largest init container."""
    amounts = [
        [quantity(container["resources"]["requests"][name]) for container in spec.get(kind, [])]
        for kind in ("containers", "initContainers")
    ]
    return max(sum(amounts[0]), *amounts[1], 0)


def test_disk_for_tmp_is_requested() -> None:
    (container,) = one(render({"generator": {"tmpSize": "20Gi"}}), "StatefulSet")["spec"]["template"]["spec"][
        "containers"
    ]
    for kind in ("requests", "limits"):
        assert quantity(container["resources"][kind]["ephemeral-storage"]) == 20 * 2**30 + 256 * 2**20
