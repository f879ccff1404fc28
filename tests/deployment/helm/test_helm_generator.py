"""The generators: devices, probes, volumes, and the objects that create their pods."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import Object, names, one, render
from support.variations import OWN

pytestmark = pytest.mark.helm


def pod(values: dict[str, Any] | None = None) -> Object:
    return one(render(values), "StatefulSet")["spec"]["template"]


def container(values: dict[str, Any] | None = None) -> Object:
    (only,) = pod(values)["spec"]["containers"]
    return only


def env(of: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in of["env"]}


def test_replicas_start_in_parallel_behind_the_headless_service_that_the_trainer_uses() -> None:
    objects = render({"generator": {"replicas": 3}})
    service = one(objects, "Service", "-generator")
    replicas = one(objects, "StatefulSet")["spec"]
    assert (replicas["replicas"], replicas["podManagementPolicy"]) == (3, "Parallel")
    assert service["spec"]["clusterIP"] == "None"
    assert replicas["serviceName"] == service["metadata"]["name"]
    (trainer,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    assert env(trainer)["TANDEM__SHARED__GENERATORS"] == f'["http://{service["metadata"]["name"]}:8000"]'


def test_the_service_selects_no_replica_with_an_older_configuration() -> None:
    old, new = render(), render({"config": {"shared": {"model": "another"}}})
    selectors = [one(objects, "Service", "-generator")["spec"]["selector"] for objects in (old, new)]
    assert selectors[0].items() <= pod()["metadata"]["labels"].items()
    assert not selectors[1].items() <= pod()["metadata"]["labels"].items()
    statefulsets = [one(objects, "StatefulSet")["spec"]["selector"] for objects in (old, new)]
    assert statefulsets[0] == statefulsets[1], "a StatefulSet's selector cannot be changed"


def test_generators_restart_after_changes_of_their_options_or_the_project_but_not_of_the_trainer() -> None:
    assert pod({"config": {"trainer": {"max_steps": 7}}}) == pod()
    assert pod({"config": {"generator": {"max_model_len": 64}}}) != pod()
    assert pod({"config": {"shared": {"revision": "main"}}}) != pod()
    own = {**OWN, "project": {"configMap": "mine"}}
    assert pod(own) != pod({**own, "project": {"configMap": "mine", "revision": "2"}})


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "amd.com/gpu"])
def test_the_parallel_sizes_use_all_devices(resource: str) -> None:
    made = container({"generator": {"accelerator": {"resource": resource, "count": 8}, "dataParallelSize": 2}})
    for kind in ("requests", "limits"):
        assert made["resources"][kind][resource] == "8"
    assert env(made)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "4"
    assert env(made)["TANDEM__GENERATOR__DATA_PARALLEL_SIZE"] == "2"


def test_pipeline_parallelism_divides_the_tensor_parallel_size() -> None:
    config = {"generator": {"vllm": {"pipeline_parallel_size": 2}}}
    made = container({"generator": {"accelerator": {"count": 8}, "dataParallelSize": 2}, "config": config})
    assert env(made)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "2"


def test_without_devices_the_chart_requests_none_and_sets_no_parallel_sizes() -> None:
    assert container()["resources"].keys() == {"requests", "limits"}
    assert set(container()["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage"}
    assert not [name for name in env(container()) if "PARALLEL" in name]


def test_shared_memory_is_added_to_the_memory_request_and_limit() -> None:
    made = pod(
        {
            "generator": {
                "shmSize": "512Mi",
                "resources": {"requests": {"memory": "1.5Gi"}, "limits": {"memory": "2G"}},
            }
        }
    )
    resources = made["spec"]["containers"][0]["resources"]
    assert resources["requests"]["memory"] == f"{1536 + 512}Mi"
    assert resources["limits"]["memory"] == f"{1908 + 512}Mi"
    (shm,) = [volume["emptyDir"] for volume in made["spec"]["volumes"] if volume["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "512Mi"}


def test_delta_versions_are_made_in_shared_memory_unless_the_configuration_says_otherwise() -> None:
    """Its size is enforced by the kernel. A pod whose /tmp is larger than its limit is evicted."""
    name = "TANDEM__GENERATOR__MATERIALIZE_DIR"
    assert env(container())[name] == "/dev/shm"
    assert name not in env(container({"config": {"generator": {"materialize_dir": "/made"}}}))


def test_the_startup_probe_allows_exactly_the_startup_budget() -> None:
    made = container({"generator": {"startupBudgetSeconds": 1800}})
    probe = made["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    assert probe["httpGet"]["path"] == "/healthz"
    assert made["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize(("config", "switch_s"), [({}, 300), ({"generator": {"switch_timeout_s": 1200.5}}, 1201)])
def test_the_liveness_probe_allows_more_time_than_a_weight_switch_takes(config: dict[str, Any], switch_s: int) -> None:
    probe = container({"config": config})["livenessProbe"]
    assert probe["httpGet"]["path"] == "/healthz"
    assert probe["periodSeconds"] * probe["failureThreshold"] > switch_s


@pytest.mark.parametrize(("config", "shutdown_s"), [({}, 30), ({"generator": {"shutdown_timeout_s": 120}}, 120)])
def test_the_grace_period_covers_the_pre_stop_pause_and_running_requests(
    config: dict[str, Any], shutdown_s: int
) -> None:
    spec = pod({"config": config})["spec"]
    pause_s = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > shutdown_s + pause_s


def test_a_drain_stops_one_replica_at_a_time_and_waits_for_none_that_is_not_ready() -> None:
    budget = one(render(), "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


@pytest.mark.parametrize("claim", ["weights", "cache"])
def test_no_budget_blocks_the_drain_of_the_only_node_that_can_mount_a_claim(claim: str) -> None:
    objects = render({"storage": {claim: {"accessMode": "ReadWriteOnce"}}})
    assert "PodDisruptionBudget" not in {kind for kind, _ in names(objects)}


def test_a_generator_can_write_only_its_leases() -> None:
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    for path in ("/weights", "/cache", "/secrets"):
        assert mounts[path]["readOnly"] is True
    assert mounts["/leases"] == {"name": "weights", "mountPath": "/leases", "subPath": "served"}
    assert env(container())["TANDEM_TOKEN_FILE"] == "/secrets/token"
    assert env(container())["HF_HUB_OFFLINE"] == "1"


def test_only_the_first_pod_of_a_multi_node_replica_serves() -> None:
    objects = render({"generator": {"replicas": 2, "nodesPerReplica": 2, "accelerator": {"count": 8}}})
    assert "StatefulSet" not in {kind for kind, _ in names(objects)}
    group = one(objects, "LeaderWorkerSet")["spec"]
    assert (group["replicas"], group["leaderWorkerTemplate"]["size"]) == (2, 2)
    leader, worker = (group["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate"))
    (serving,), (working,) = leader["spec"]["containers"], worker["spec"]["containers"]
    nodes = ["--nnodes", "2", "--master-addr", "$(LWS_LEADER_ADDRESS)", "--node-rank", "$(LWS_WORKER_INDEX)"]
    assert serving["args"] == ["--config", "/cache/projects/run-tandem/config.yaml", *nodes]
    assert working["args"] == [*serving["args"], "--headless"]
    assert env(serving)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "16"
    assert working["resources"] == serving["resources"]
    assert "readinessProbe" not in working, "a worker has no port"
    selector = one(objects, "Service", "-generator")["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= worker["metadata"]["labels"].items()
