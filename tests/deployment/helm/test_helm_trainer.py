"""The trainer: the Job and its name, retries, several nodes, and the order of two trainers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.helm import Object, names, one, render

pytestmark = pytest.mark.helm

SHARED_RUNS = {"storage": {"runs": {"accessMode": "ReadWriteMany"}}}


def job(values: dict[str, Any] | None = None) -> Object:
    return one(render(values), "Job")


def container(of: Object) -> Object:
    (only,) = of["template"]["spec"]["containers"]
    return only


def env(of: Object) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in of["env"]}


def claims(of: Object) -> dict[str, str]:
    volumes = of["spec"]["template"]["spec"]["volumes"]
    return {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"trainer": {"max_steps": 7}}},
        {"config": {"generator": {"max_model_len": 64}}},
        {"trainer": {"image": {"tag": "other"}}},
        {"trainer": {"resources": {"limits": {"cpu": "3"}}}},
        {"trainer": {"env": {"NCCL_DEBUG": "INFO"}}},
        {"trainer": {"nodeSelector": {"zone": "a"}}},
        {"trainer": {"backoffLimit": 1}},
        {"offline": False},
        {"imagePullSecrets": [{"name": "registry"}]},
    ],
    ids=str,
)
def test_a_change_of_the_job_changes_its_name_and_keeps_its_claims(change: dict[str, Any]) -> None:
    old, new = job(), job(change)
    assert old["metadata"]["name"] != new["metadata"]["name"], "a Job's template cannot be changed"
    assert claims(new) == claims(old) == {name: f"run-tandem-{name}" for name in ("weights", "cache", "runs")}


@pytest.mark.parametrize(
    "change",
    [
        {"generator": {"replicas": 2, "image": {"tag": "other"}, "startupBudgetSeconds": 60, "env": {"A": "b"}}},
        {"monitoring": {"rules": {"enabled": True}}},
        {"networkPolicy": {"enabled": False}},
        {"storage": {"runs": {"size": "1Ti"}}},
    ],
)
def test_changes_outside_the_job_leave_it_unchanged(change: dict[str, Any]) -> None:
    assert job(change) == job()


def test_a_new_chart_version_alone_does_not_change_the_job() -> None:
    assert not [label for label in job()["spec"]["template"]["metadata"]["labels"] if "version" in label]


def verdict(spec: Object, status: int, container: str = "trainer", *, evicted: bool = False) -> str:
    """Return what the Job controller does with a pod: the action of the first rule that matches, or Count."""
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        matches = (
            codes["operator"] == "In"
            and status in codes["values"]
            and codes.get("containerName", container) == container
            if codes
            else evicted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
        )
        if matches:
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize("container", ["prepare", "trainer"])
def test_a_stopped_pod_is_replaced_a_mistake_ends_the_job_and_other_failures_count(container: str) -> None:
    spec = job({"trainer": {"backoffLimit": 3}})["spec"]
    assert spec["backoffLimit"] == 3
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert verdict(spec, 143, container) == "Ignore", "kubectl delete pod, a node that shuts down"
    assert verdict(spec, 137, container, evicted=True) == "Ignore", "a drain whose pod did not end in time"
    assert verdict(spec, 2, container) == "FailJob"
    assert verdict(spec, 1, container) == verdict(spec, 137, container) == "Count"


def test_a_jobset_replaces_a_stopped_pod_too() -> None:
    made = one(render({**SHARED_RUNS, "trainer": {"nodes": 2, "jobSet": True}}), "JobSet")
    (replicated,) = made["spec"]["replicatedJobs"]
    assert verdict(replicated["template"]["spec"], 143) == "Ignore"


def test_the_launcher_stops_within_the_grace_period() -> None:
    spec = job({"trainer": {"terminationGracePeriodSeconds": 600}})["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    assert int(env(container(spec))["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 600


def test_the_trainer_starts_one_process_per_device() -> None:
    spec = job({"trainer": {"accelerator": {"count": 4}}})["spec"]
    assert env(container(spec))["TANDEM_TRAINER_PROCESSES"] == "4"
    assert container(spec)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    (prepare,) = spec["template"]["spec"]["initContainers"]
    assert "nvidia.com/gpu" not in prepare["resources"]["limits"]
    assert env(container(job()["spec"]))["TANDEM_TRAINER_PROCESSES"] == "1"


def test_a_single_node_gets_no_rendezvous() -> None:
    assert job()["spec"]["completionMode"] == "NonIndexed"
    assert not {"TANDEM_TRAINER_NODES", "TANDEM_TRAINER_RENDEZVOUS"} & env(container(job()["spec"])).keys()
    assert ("Service", "run-tandem-trainer") not in names(render())


def test_several_nodes_use_the_first_node_as_rendezvous() -> None:
    objects = render({**SHARED_RUNS, "trainer": {"nodes": 3, "accelerator": {"count": 8}}})
    made = one(objects, "Job")
    service = one(objects, "Service", "-trainer")
    spec = made["spec"]
    variables = env(container(spec))
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (variables["TANDEM_TRAINER_NODES"], variables["TANDEM_TRAINER_PROCESSES"]) == ("3", "8")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert variables["TANDEM_TRAINER_NODE_RANK"] == {"fieldRef": {"fieldPath": index}}
    # A pod of an Indexed Job has the host name JOB-INDEX. With a subdomain, its DNS name is JOB-INDEX.SERVICE.
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    first = f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    assert variables["TANDEM_TRAINER_RENDEZVOUS"] == f"{first}:29500"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_a_jobset_restarts_all_nodes_and_uses_its_own_rendezvous_name() -> None:
    objects = render({**SHARED_RUNS, "trainer": {"nodes": 2, "jobSet": True, "backoffLimit": 4}})
    made = one(objects, "JobSet")
    assert ("Service", "run-tandem-trainer") not in names(objects)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 4
    (replicated,) = made["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    name = made["metadata"]["name"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    rendezvous = env(container(spec))["TANDEM_TRAINER_RENDEZVOUS"]
    assert rendezvous == f"{name}-{replicated['name']}-0-0.{name}:29500"


@pytest.mark.parametrize("jobset", [False, True])
def test_the_host_name_of_a_pod_fits_into_a_dns_label(jobset: bool) -> None:
    values = {**SHARED_RUNS, "fullnameOverride": "x" * 80, "trainer": {"nodes": 100, "jobSet": jobset}}
    name = one(render(values), "JobSet" if jobset else "Job")["metadata"]["name"]
    suffix = "-abcde"  # Kubernetes adds such a suffix to the name of a pod
    assert len(f"{name}-node-0-99{suffix}" if jobset else f"{name}-99{suffix}") <= 63


def test_the_project_is_prepared_after_the_previous_trainer_had_time_to_end() -> None:
    spec = job({"trainer": {"terminationGracePeriodSeconds": 600}})["spec"]["template"]["spec"]
    (prepare,) = spec["initContainers"]
    assert int(re.findall(r"flock .*--timeout (\d+)", prepare["command"][-1])[0]) > 600
