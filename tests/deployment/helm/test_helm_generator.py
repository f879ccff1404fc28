"""Generators: a StatefulSet whose pods get their devices, time to start, and time to stop."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import Object, names, one, render

pytestmark = pytest.mark.helm


def pod(values: dict[str, Any] | None = None) -> Object:
    return one(render(values), "StatefulSet")["spec"]["template"]


def container(values: dict[str, Any] | None = None) -> Object:
    (only,) = pod(values)["spec"]["containers"]
    return only


def env(of: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in of["env"]}


def test_replicas_start_together_behind_one_headless_name_that_the_trainer_is_given() -> None:
    objects = render({"generator": {"replicas": 3}})
    service, replicas = one(objects, "Service", "-generator"), one(objects, "StatefulSet")["spec"]
    assert (replicas["replicas"], replicas["podManagementPolicy"]) == (3, "Parallel")
    assert service["spec"]["clusterIP"] == "None"
    assert replicas["serviceName"] == service["metadata"]["name"]
    (trainer,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    assert env(trainer)["TANDEM__SHARED__GENERATORS"] == f'["http://{service["metadata"]["name"]}:8000"]'


def test_the_trainer_meets_no_replica_of_an_older_configuration() -> None:
    old, new = render(), render({"config": {"shared": {"model": "another"}}})
    selectors = [one(objects, "Service", "-generator")["spec"]["selector"] for objects in (old, new)]
    assert selectors[0].items() <= pod()["metadata"]["labels"].items()
    assert not selectors[1].items() <= pod()["metadata"]["labels"].items()
    statefulsets = [one(objects, "StatefulSet")["spec"]["selector"] for objects in (old, new)]
    assert statefulsets[0] == statefulsets[1], "a StatefulSet's selector cannot be changed"


def test_generators_start_anew_for_their_own_options_and_the_projects_but_not_for_the_trainers() -> None:
    assert pod({"config": {"trainer": {"max_steps": 7}}}) == pod()
    assert pod({"config": {"generator": {"max_model_len": 64}}}) != pod()
    assert pod({"config": {"shared": {"revision": "main"}}}) != pod()
    own = {"config": {"shared": {"model": "m"}}, "project": {"configMap": "mine"}}
    assert pod(own) != pod({**own, "project": {"configMap": "mine", "revision": "2"}})


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "nvidia.com/mig-3g.40gb", "amd.com/gpu"])
def test_parallel_sizes_use_exactly_the_devices(resource: str) -> None:
    made = container({"generator": {"accelerator": {"resource": resource, "count": 8}, "dataParallelSize": 2}})
    for kind in ("requests", "limits"):
        assert made["resources"][kind][resource] == "8"
    assert env(made)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "4"
    assert env(made)["TANDEM__GENERATOR__DATA_PARALLEL_SIZE"] == "2"


def test_pipeline_parallel_takes_its_share_of_the_devices() -> None:
    config = {"generator": {"vllm": {"pipeline_parallel_size": 2}}}
    made = container({"generator": {"accelerator": {"count": 8}, "dataParallelSize": 2}, "config": config})
    assert env(made)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "2"


def test_without_devices_nothing_is_asked_for_and_the_configuration_decides() -> None:
    assert container()["resources"].keys() == {"requests", "limits"}
    assert set(container()["resources"]["limits"]) == {"cpu", "memory"}
    assert not [name for name in env(container()) if "PARALLEL" in name]


def test_shared_memory_is_counted_into_the_memory_limit() -> None:
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


def test_one_number_is_the_budget_of_a_start() -> None:
    made = container({"generator": {"startupBudgetSeconds": 1800}})
    probe = made["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    assert probe["httpGet"]["path"] == "/healthz"
    assert made["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize(("config", "switch_s"), [({}, 300), ({"generator": {"switch_timeout_s": 1200.5}}, 1201)])
def test_liveness_outlasts_a_weight_switch(config: dict[str, Any], switch_s: int) -> None:
    probe = container({"config": config})["livenessProbe"]
    assert probe["httpGet"]["path"] == "/healthz"
    assert probe["periodSeconds"] * probe["failureThreshold"] > switch_s


@pytest.mark.parametrize(("config", "running_s"), [({}, 30), ({"generator": {"shutdown_timeout_s": 120}}, 120)])
def test_the_grace_is_longer_than_running_requests_and_the_pause_before_it(
    config: dict[str, Any], running_s: int
) -> None:
    spec = pod({"config": config})["spec"]
    pause_s = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > running_s + pause_s


def test_disruptions_take_one_replica_at_a_time() -> None:
    assert one(render(), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_weights_project_and_token_are_read_only_and_the_lease_alone_is_written() -> None:
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    for path in ("/weights", "/cache", "/secrets"):
        assert mounts[path]["readOnly"] is True
    assert mounts["/leases"] == {"name": "weights", "mountPath": "/leases", "subPath": "served"}
    assert env(container())["TANDEM_TOKEN_FILE"] == "/secrets/token"
    assert env(container())["HF_HUB_OFFLINE"] == "1"


def test_a_replica_over_several_nodes_is_a_group_of_which_the_first_serves() -> None:
    objects = render({"generator": {"replicas": 2, "nodesPerReplica": 2, "accelerator": {"count": 8}}})
    assert "StatefulSet" not in {kind for kind, _ in names(objects)}
    group = one(objects, "LeaderWorkerSet")["spec"]
    assert (group["replicas"], group["leaderWorkerTemplate"]["size"]) == (2, 2)
    leader, worker = (group["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate"))
    (serving,), (working,) = leader["spec"]["containers"], worker["spec"]["containers"]
    nodes = ["--nnodes", "2", "--master-addr", "$(LWS_LEADER_ADDRESS)", "--node-rank", "$(LWS_WORKER_INDEX)"]
    assert serving["args"] == ["--config", "/cache/project/config.yaml", *nodes]
    assert working["args"] == [*serving["args"], "--headless"]
    assert env(serving)["TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE"] == "16"
    assert working["resources"] == serving["resources"]
    assert "readinessProbe" not in working, "it has no port"
    selector = one(objects, "Service", "-generator")["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= worker["metadata"]["labels"].items()
