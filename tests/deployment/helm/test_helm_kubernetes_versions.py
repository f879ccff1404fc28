"""Every object is one that Kubernetes takes, from the oldest version that the chart allows to the newest known."""

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
"""Whose objects are not Kubernetes' own, so that nothing here knows their schema; what is in them is."""


@pytest.fixture(autouse=True)
def schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads megabytes of them for every object."""
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", SCHEMA_CONTENTS)


def own(thing: Object) -> list[Object]:
    """The object, or what an operator would make of it."""
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
    """Cached, since combinations have most of their objects in common."""
    thing = json.loads(text)
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{thing['kind']} {thing['metadata'].get('name')}: {error.message}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_chart_makes_is_valid(version: str) -> None:
    names = list(VARIATIONS) if version in (VERSIONS[0], VERSIONS[-1]) else ["defaults", *CI]
    problems = {name: invalid(render(VARIATIONS[name]), version) for name in names}
    assert {name: found for name, found in problems.items() if found} == {}


def test_an_object_that_is_wrong_is_noticed() -> None:
    (service,) = [thing for thing in render() if thing["kind"] == "Service"]
    assert invalid([{**service, "spec": {**service["spec"], "ports": "http"}}], VERSIONS[0])
    jobset = next(thing for thing in render(VARIATIONS["multinode"]) if thing["kind"] == "JobSet")
    (job,) = own(jobset)
    assert invalid([{**job, "spec": {**job["spec"], "completionz": 1}}], VERSIONS[0])


def test_an_older_cluster_is_refused() -> None:
    with pytest.raises(AssertionError, match="incompatible with Kubernetes"):
        render(None, "--kube-version", "1.28")
