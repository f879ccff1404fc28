"""What a platform team sets on workloads and pods arrives there, and does not replace what the chart needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from support.chart_rules import violations
from support.helm import Object, one, pod_templates, render
from support.variations import KNOBS, SIDECAR, SPREAD

pytestmark = pytest.mark.helm

TERM = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"a": "b"}}}
AS_IS = ("schedulerName", "priorityClassName", "runtimeClassName", "nodeSelector", "tolerations", "affinity")
SHARED = {"storage": {"runs": {"accessMode": "ReadWriteMany"}}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "StatefulSet": ("generator", {}),
    "LeaderWorkerSet": ("generator", {"generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}}}),
    "Job": ("trainer", {}),
    "JobSet": ("trainer", {**SHARED, "trainer": {"nodes": 2, "jobSet": True}}),
}


def workload(kind: str, knobs: dict[str, Any], **values: Any) -> tuple[Object, list[Object]]:
    """Return the workload of a kind and its pod templates."""
    service, base = KINDS[kind]
    made = copy.deepcopy({**base, **values})
    made[service] = {**made.get(service, {}), **knobs}
    thing = one(render(made), kind)
    return thing, pod_templates(thing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_knob_reaches_the_workload_and_its_pods(kind: str) -> None:
    thing, pods = workload(kind, KNOBS)
    for name in ("labels", "annotations"):
        assert KNOBS[name].items() <= thing["metadata"][name].items()
    for pod in pods:
        assert KNOBS["podLabels"].items() <= pod["metadata"]["labels"].items()
        assert KNOBS["podAnnotations"].items() <= pod["metadata"]["annotations"].items()
        spec = pod["spec"]
        assert {name: spec[name] for name in AS_IS} == {name: KNOBS[name] for name in AS_IS}
        assert spec["topologySpreadConstraints"] == [SPREAD]
        assert KNOBS["extraVolumes"][0] in spec["volumes"]
        (container,) = spec["containers"]
        assert KNOBS["extraVolumeMounts"][0] in container["volumeMounts"]
        assert KNOBS["extraEnv"][0] in container["env"]
        assert spec["initContainers"][-1] == SIDECAR


def test_the_preparation_gets_the_trainers_variables_and_mounts() -> None:
    _, (pod,) = workload("Job", {**KNOBS, "env": {"HTTPS_PROXY": "http://proxy:3128"}})
    prepare = pod["spec"]["initContainers"][0]
    assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in prepare["env"]
    assert KNOBS["extraEnv"][0] in prepare["env"]
    assert KNOBS["extraVolumeMounts"][0] in prepare["volumeMounts"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_knob_replaces_a_label_that_selectors_use_or_an_annotation_of_the_chart(kind: str) -> None:
    component = "app.kubernetes.io/component"
    plain, plain_pods = workload(kind, {})
    taken = {**dict.fromkeys((component, "tandem/generator-config"), "mine"), "team": "rl"}
    thing, pods = workload(kind, {"labels": taken, "podLabels": taken, "podAnnotations": {"checksum/config": "mine"}})
    assert thing["metadata"]["labels"][component] == plain["metadata"]["labels"][component]
    for pod, before in zip(pods, plain_pods, strict=True):
        assert before["metadata"]["labels"].items() <= pod["metadata"]["labels"].items()
        if kind.startswith("Job"):
            assert pod["metadata"]["annotations"]["checksum/config"] != "mine"


def test_the_objects_follow_the_rules_with_every_knob() -> None:
    assert violations(render({"generator": KNOBS, "trainer": KNOBS})) == []


def test_affinity_of_the_values_is_kept_beside_the_term_for_a_read_write_once_claim() -> None:
    own = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [TERM]}, "nodeAffinity": {}}
    storage = {"weights": {"accessMode": "ReadWriteOnce"}}
    for kind in ("StatefulSet", "Job"):
        _, (pod,) = workload(kind, {"affinity": own}, storage=storage)
        terms = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert terms[0] == TERM
        assert [term["topologyKey"] for term in terms] == ["zone", "kubernetes.io/hostname"]
        assert pod["spec"]["affinity"]["nodeAffinity"] == {}


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_a_job_can_be_created_suspended_and_started_without_another_name(kind: str) -> None:
    waiting, _ = workload(kind, {"suspend": True})
    started, _ = workload(kind, {})
    assert waiting["spec"]["suspend"] is True
    assert "suspend" not in started["spec"], "a queue has its own value there, which an upgrade must not replace"
    assert waiting["metadata"]["name"] == started["metadata"]["name"]


def test_a_change_of_the_jobs_own_labels_does_not_start_another_job() -> None:
    (before, _), (after, _) = (
        workload("Job", {}),
        workload("Job", {"labels": {"team": "rl"}, "annotations": {"a": "b"}}),
    )
    assert before["metadata"]["name"] == after["metadata"]["name"]
