"""The claims: their access modes, the placement of pods on one node, and existing claims."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import Object, of_kind, one, pod_templates, refusal, render

pytestmark = pytest.mark.helm

ONE_NODE = {"storage": {"weights": {"accessMode": "ReadWriteOnce"}}}


def service_pods(values: dict[str, Any]) -> list[Object]:
    return [pod for thing in render(values) if thing["kind"] != "Pod" for pod in pod_templates(thing)]


def test_the_claims_that_both_services_mount_are_read_write_many() -> None:
    modes = {c["metadata"]["name"]: c["spec"]["accessModes"] for c in of_kind(render(), "PersistentVolumeClaim")}
    assert modes == {
        "run-tandem-weights": ["ReadWriteMany"],
        "run-tandem-cache": ["ReadWriteMany"],
        "run-tandem-runs": ["ReadWriteOnce"],
    }
    assert all("affinity" not in pod["spec"] for pod in service_pods({}))


@pytest.mark.parametrize("claim", ["weights", "cache"])
def test_a_read_write_once_claim_places_all_pods_on_the_generators_node(claim: str) -> None:
    pods = service_pods({"generator": {"replicas": 2}, "storage": {claim: {"accessMode": "ReadWriteOnce"}}})
    assert len(pods) == 2
    (generator,) = [pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "generator"]
    for pod in pods:
        (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= generator["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("values", "claim"),
    [
        ({**ONE_NODE, "generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}}}, "weights"),
        ({"storage": {"cache": {"accessMode": "ReadWriteOnce"}}, "trainer": {"nodes": 2}}, "cache"),
        ({"trainer": {"nodes": 2}}, "runs"),
    ],
)
def test_a_read_write_once_claim_is_refused_with_several_nodes(values: dict[str, Any], claim: str) -> None:
    message = refusal(values)
    assert f"storage.{claim}.accessMode: got ReadWriteOnce" in message
    assert "expected ReadWriteMany" in message


def test_a_multi_node_generator_accepts_a_read_write_once_runs_claim() -> None:
    render({"generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}}})


def test_existing_claims_are_mounted_and_none_is_created() -> None:
    storage = {name: {"existingClaim": f"my-{name}"} for name in ("weights", "cache", "runs")}
    objects = render({"storage": storage})
    assert not of_kind(objects, "PersistentVolumeClaim")
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in service_pods({"storage": storage})
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert mounted == {"my-weights", "my-cache", "my-runs"}


def test_a_claim_gets_its_size_and_storage_class() -> None:
    storage = {"weights": {"storageClassName": "nfs", "size": "1Ti"}}
    spec = one(render({"storage": storage}), "PersistentVolumeClaim", "-weights")["spec"]
    assert spec == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "nfs",
        "resources": {"requests": {"storage": "1Ti"}},
    }
    assert "storageClassName" not in one(render(), "PersistentVolumeClaim", "-weights")["spec"]
