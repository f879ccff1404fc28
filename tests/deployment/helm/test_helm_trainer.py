"""The trainer: a Job that resumes, under another name when anything in it is another; nodes that find each other."""

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
def test_whatever_changes_the_job_gives_it_another_name_and_the_same_claims(change: dict[str, Any]) -> None:
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
def test_what_does_not_change_the_job_leaves_it_alone(change: dict[str, Any]) -> None:
    assert job(change) == job()


def test_a_release_of_the_chart_alone_starts_no_new_job() -> None:
    assert not [label for label in job()["spec"]["template"]["metadata"]["labels"] if "version" in label]


def test_it_is_tried_again_but_not_for_a_users_mistake_and_evictions_do_not_count() -> None:
    spec = job({"trainer": {"backoffLimit": 3}})["spec"]
    assert spec["backoffLimit"] == 3
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    eviction, mistake = spec["podFailurePolicy"]["rules"]
    assert (eviction["action"], eviction["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (mistake["action"], mistake["onExitCodes"]["values"]) == ("FailJob", [2])
    assert "containerName" not in mistake["onExitCodes"], "prepare finds mistakes too"


def test_the_launcher_stops_within_the_grace() -> None:
    spec = job({"trainer": {"terminationGracePeriodSeconds": 600}})["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    assert int(env(container(spec))["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 600


def test_there_is_a_process_for_each_device() -> None:
    spec = job({"trainer": {"accelerator": {"count": 4}}})["spec"]
    assert env(container(spec))["TANDEM_TRAINER_PROCESSES"] == "4"
    assert container(spec)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    (prepare,) = spec["template"]["spec"]["initContainers"]
    assert "nvidia.com/gpu" not in prepare["resources"]["limits"]
    assert env(container(job()["spec"]))["TANDEM_TRAINER_PROCESSES"] == "1"


def test_one_node_needs_no_rendezvous() -> None:
    assert job()["spec"]["completionMode"] == "NonIndexed"
    assert not {"TANDEM_TRAINER_NODES", "TANDEM_TRAINER_RENDEZVOUS"} & env(container(job()["spec"])).keys()
    assert ("Service", "run-tandem-trainer") not in names(render())


def test_several_nodes_meet_at_the_name_of_the_first() -> None:
    objects = render({**SHARED_RUNS, "trainer": {"nodes": 3, "accelerator": {"count": 8}}})
    made, service = one(objects, "Job"), one(objects, "Service", "-trainer")
    spec, words = made["spec"], env(container(made["spec"]))
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (words["TANDEM_TRAINER_NODES"], words["TANDEM_TRAINER_PROCESSES"]) == ("3", "8")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert words["TANDEM_TRAINER_NODE_RANK"] == {"fieldRef": {"fieldPath": index}}
    # A pod of an Indexed Job has the host name JOB-INDEX; with a subdomain, DNS knows it under that of the Service.
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    first = f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    assert words["TANDEM_TRAINER_RENDEZVOUS"] == f"{first}:29500"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_a_jobset_starts_all_nodes_anew_and_meets_at_its_own_name() -> None:
    objects = render({**SHARED_RUNS, "trainer": {"nodes": 2, "jobSet": True, "backoffLimit": 4}})
    made = one(objects, "JobSet")
    assert ("Service", "run-tandem-trainer") not in names(objects)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 4
    (replicated,) = made["spec"]["replicatedJobs"]
    spec, name = replicated["template"]["spec"], made["metadata"]["name"]
    assert (spec["completionMode"], spec["backoffLimit"]) == ("Indexed", 0)
    rendezvous = env(container(spec))["TANDEM_TRAINER_RENDEZVOUS"]
    assert rendezvous == f"{name}-{replicated['name']}-0-0.{name}:29500"


@pytest.mark.parametrize("jobset", [False, True])
def test_a_pods_host_name_fits_into_a_dns_label(jobset: bool) -> None:
    values = {**SHARED_RUNS, "fullnameOverride": "x" * 80, "trainer": {"nodes": 100, "jobSet": jobset}}
    name = one(render(values), "JobSet" if jobset else "Job")["metadata"]["name"]
    suffix = "-abcde"  # which a pod's own name has besides
    assert len(f"{name}-node-0-99{suffix}" if jobset else f"{name}-99{suffix}") <= 63


def test_the_trainer_before_this_one_has_ended_when_the_project_is_prepared() -> None:
    spec = job({"trainer": {"terminationGracePeriodSeconds": 600}})["spec"]["template"]["spec"]
    (prepare,) = spec["initContainers"]
    lines = prepare["command"][-1].splitlines()
    wait = next(i for i, line in enumerate(lines) if "flock" in line)
    assert int(re.findall(r"--timeout (\d+)", lines[wait])[0]) > 600
    assert "/weights/WRITER" in lines[wait], "the lock that the store's writer holds"
    assert "preflight.py" in lines[wait + 1]
