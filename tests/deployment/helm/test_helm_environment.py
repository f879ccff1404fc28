"""The pods of the environment: what they can reach, what they have, and that the trainer uses them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployment.helm.test_helm_network import BASE, Flow, dns, flows
from support.helm import Object, names, of_kind, one, render

pytestmark = pytest.mark.helm

ENABLED: dict[str, Any] = {"environment": {"enabled": True}}
SHOP = [
    {"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "neighbour"}}}], "ports": [{"port": 80}]}
]


def container(thing: Object) -> Object:
    (only,) = thing["spec"]["template"]["spec"]["containers"]
    return only


def env(of: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in of["env"]}


def test_by_default_there_is_no_environment() -> None:
    assert not [name for _, name in names(render()) if "environment" in name]
    trainer = container(one(render(), "Job"))
    assert not [name for name in env(trainer) if "ENVIRONMENT" in name]


def test_only_the_trainer_reaches_the_environment_which_reaches_nothing() -> None:
    others: set[Flow] = BASE | dns("trainer", "generator", "test")
    assert flows(ENABLED) == others | {("trainer", "environment", 8100)}
    assert not [flow for flow in flows(ENABLED, protocol="UDP") if flow[0] == "environment"]


def test_egress_is_a_switch_and_needs_dns() -> None:
    opened = flows({"environment": {"enabled": True, "egress": SHOP}}) - flows(ENABLED)
    assert opened == {("environment", "neighbour", 80)} | dns("environment")


def test_the_trainer_uses_the_service_with_the_token_of_the_environment_only() -> None:
    objects = render(ENABLED)
    service = one(objects, "Service", "-environment")
    trainer, environment = container(one(objects, "Job")), container(one(objects, "Deployment"))
    url = f"http://{service['metadata']['name']}:8100"
    assert json.loads(env(trainer)["TANDEM__TRAINER__ROLLOUT__ENVIRONMENT_URLS"]) == [url]
    for one_of in (trainer, environment):
        assert env(one_of)["TANDEM_ENVIRONMENT_TOKEN_FILE"] == "/environment-secrets/token"
    secrets = {
        thing["kind"]: [
            v["secret"]["secretName"] for v in thing["spec"]["template"]["spec"]["volumes"] if "secret" in v
        ]
        for thing in of_kind(objects, "Job") + of_kind(objects, "Deployment") + of_kind(objects, "StatefulSet")
    }
    assert secrets == {
        "Job": ["run-tandem-token", "run-tandem-environment-token"],
        "Deployment": ["run-tandem-environment-token"],
        "StatefulSet": ["run-tandem-token"],
    }


def test_the_environment_has_no_weights_and_nothing_that_it_may_write_but_tmp() -> None:
    pod = one(render(ENABLED), "Deployment")["spec"]["template"]["spec"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == ["run-tandem-cache"]
    for of in (*pod["initContainers"], *pod["containers"]):
        assert [m["mountPath"] for m in of["volumeMounts"] if not m.get("readOnly")] in ([], ["/tmp"])


def test_a_change_of_the_project_replaces_the_pods_and_the_service_selects_the_new_ones() -> None:
    before = render(ENABLED)
    after = render({**ENABLED, "config": {"trainer": {"rollout": {"max_turns": 3}}}})
    services = [one(objects, "Service", "-environment")["spec"]["selector"] for objects in (before, after)]
    pods = [one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"] for objects in (before, after)]
    assert services[0].items() <= pods[0].items()
    assert not services[1].items() <= pods[0].items()
    assert services[1].items() <= pods[1].items()
    selectors = [one(objects, "Deployment")["spec"]["selector"] for objects in (before, after)]
    assert selectors[0] == selectors[1], "a Deployment's selector cannot be changed"


def test_an_existing_secret_is_used() -> None:
    values = {"environment": {"enabled": True, "token": {"existingSecret": "mine", "key": "t"}}}
    objects = render(values)
    assert not [name for _, name in names(objects) if name.endswith("environment-token")]
    volumes = one(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert [v["secret"] for v in volumes if "secret" in v] == [
        {"secretName": "mine", "items": [{"key": "t", "path": "token"}], "defaultMode": 0o440}
    ]
