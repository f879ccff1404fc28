"""Every object is valid in Kubernetes, from the oldest version that the chart allows to the newest known one."""

from __future__ import annotations

import functools
import json

import kubernetes_validate
import pytest
import yaml

from support.helm import CHART, Object, pod_templates, render
from support.variations import CI, VARIATIONS

pytestmark = pytest.mark.helm

OLDEST = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"].removeprefix(">=").removesuffix(".0-0")
VERSIONS = (OLDEST, "1.31", "1.34", kubernetes_validate.latest_version())
SCHEMA_CONTENTS = functools.cache(kubernetes_validate.utils.schema_contents)
OPERATORS = ("monitoring.coreos.com", "jobset.x-k8s.io", "leaderworkerset.x-k8s.io")
"""API groups of operators. Their schemas are not available here, so only the pods and Jobs inside are validated."""


@pytest.fixture(autouse=True)
def schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache the schemas: the library reads megabytes of them again for every object."""
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", SCHEMA_CONTENTS)


def own(thing: Object) -> list[Object]:
    """Return the object itself, or the objects that an operator would create from it."""
    if not thing["apiVersion"].startswith(OPERATORS):
        return [thing]
    if thing["kind"] == "JobSet":
        return [
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]}
            for job in thing["spec"]["replicatedJobs"]
        ]
    return [{"apiVersion": "v1", "kind": "Pod", **template} for template in pod_templates(thing)]


def invalid(objects: list[Object], version: str) -> list[str]:
    made = (json.dumps(thing, sort_keys=True) for each in objects for thing in own(each))
    return [problem for text in made if (problem := _invalid(text, version))]


@functools.cache
def _invalid(text: str, version: str) -> str | None:
    """Validate one object. The result is cached, because the sets of values share most of their objects."""
    thing = json.loads(text)
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{thing['kind']} {thing['metadata'].get('name')}: {error.message}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(version: str) -> None:
    names = list(VARIATIONS) if version in (VERSIONS[0], VERSIONS[-1]) else ["defaults", *CI]
    problems = {name: invalid(render(VARIATIONS[name], upgrade=True), version) for name in names}
    assert {name: found for name, found in problems.items() if found} == {}


def test_an_invalid_object_is_detected() -> None:
    (service,) = [thing for thing in render() if thing["kind"] == "Service"]
    assert invalid([{**service, "spec": {**service["spec"], "ports": "http"}}], VERSIONS[0])
    jobset = next(thing for thing in render(VARIATIONS["multinode"]) if thing["kind"] == "JobSet")
    (job,) = own(jobset)
    assert invalid([{**job, "spec": {**job["spec"], "completionz": 1}}], VERSIONS[0])


def test_an_older_cluster_is_refused() -> None:
    with pytest.raises(AssertionError, match="incompatible with Kubernetes"):
        render(None, "--kube-version", "1.28")
