"""The pod of `tandem watch`: it can only read the runs, reaches nothing, and only an Ingress controller reaches it."""

from __future__ import annotations

from typing import Any

import pytest

from deployment.helm.test_helm_network import BASE, dns, flows
from support.helm import Object, names, one, refusal, render
from support.variations import CI, KNOBS

pytestmark = pytest.mark.helm

SHARED: dict[str, Any] = {"storage": {"runs": {"accessMode": "ReadWriteMany"}}}
ENABLED: dict[str, Any] = {**SHARED, "watch": {"enabled": True}}
ONE_NODE: dict[str, Any] = {"storage": {"weights": {"accessMode": "ReadWriteOnce"}}, "watch": {"enabled": True}}


def pod(values: dict[str, Any]) -> Object:
    return dict(one(render(values), "Deployment", "-watch")["spec"]["template"])


def container(values: dict[str, Any]) -> Object:
    (only,) = pod(values)["spec"]["containers"]
    return dict(only)


def test_by_default_there_is_no_page() -> None:
    assert not [name for _, name in names(render(SHARED)) if "watch" in name]


def test_the_page_can_only_read_the_runs_and_has_a_token_of_its_own() -> None:
    spec = pod(ENABLED)["spec"]
    assert [v.get("persistentVolumeClaim", v.get("secret")) for v in spec["volumes"]] == [
        {"claimName": "run-tandem-runs"},
        {
            "secretName": "run-tandem-watch-token",
            "items": [{"key": "token", "path": "token"}],
            "defaultMode": 0o440,
        },
    ]
    (of,) = spec["containers"]
    assert all(mount["readOnly"] for mount in of["volumeMounts"])
    assert of["args"] == ["watch", "--all=/runs", "--host=0.0.0.0"]
    assert of["env"] == [{"name": "TANDEM_WATCH_TOKEN_FILE", "value": "/secrets/token"}]


def test_an_existing_secret_is_used() -> None:
    values = {**SHARED, "watch": {"enabled": True, "token": {"existingSecret": "mine", "key": "t"}}}
    assert not [name for _, name in names(render(values)) if name.endswith("watch-token")]
    assert pod(values)["spec"]["volumes"][1]["secret"]["secretName"] == "mine"


def test_the_page_reaches_nothing_and_nobody_reaches_it() -> None:
    assert flows(ENABLED) == BASE | dns("trainer", "generator", "test")
    assert flows(ENABLED, protocol="UDP") == dns("trainer", "generator", "test")


def test_the_ingress_controller_reaches_the_page_which_knows_its_name() -> None:
    values = {**ENABLED, "watch": {**CI["watch"]["watch"]}}
    values["watch"]["ingress"] = {**values["watch"]["ingress"], "controllerNamespace": "monitoring"}
    assert flows(values) - flows(ENABLED) == {("prometheus", "watch", 8600)}
    assert "--url=https://watch.example.com" in container(values)["args"]
    ingress = one(render(values), "Ingress")["spec"]
    assert (ingress["ingressClassName"], ingress["tls"]) == (
        "nginx", [{"hosts": ["watch.example.com"], "secretName": "watch-tls"}],
    )  # fmt: skip
    service = one(render(values), "Service", "-watch")
    (path,) = ingress["rules"][0]["http"]["paths"]
    assert path["backend"]["service"] == {"name": service["metadata"]["name"], "port": {"name": "http"}}
    assert service["spec"]["selector"].items() <= pod(values)["metadata"]["labels"].items()
    values["watch"]["ingress"]["tlsSecret"] = ""
    assert "--url=http://watch.example.com" in container(values)["args"]


def test_a_claim_that_only_one_node_can_mount_is_refused_unless_all_pods_are_on_one_node() -> None:
    message = refusal({"watch": {"enabled": True}})
    assert "watch.enabled: got true with storage.runs.accessMode ReadWriteOnce, expected ReadWriteMany" in message
    (term,) = pod(ONE_NODE)["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert "affinity" not in pod(ENABLED)["spec"]


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"ingress": {"enabled": True}}, "watch.ingress.host: got an empty name"),
        ({"ingress": {"enabled": True, "host": "https://a"}}, "at '/watch/ingress/host'"),
        ({"image": {"tag": "latest"}}, "watch.image.tag: got"),
        ({"port": 1}, "additional properties 'port' not allowed"),
    ],
    ids=str,
)
def test_a_mistake_is_refused(watch: dict[str, Any], message: str) -> None:
    assert message in refusal({**SHARED, "watch": {"enabled": True, **watch}})


def test_values_of_a_page_that_is_off_are_not_checked() -> None:
    render({"watch": {"image": {"tag": "latest"}, "ingress": {"enabled": True}}})


def test_what_a_platform_team_sets_reaches_the_pod() -> None:
    knobs = {name: KNOBS[name] for name in ("nodeSelector", "tolerations", "priorityClassName", "runtimeClassName")}
    made = {"podLabels": KNOBS["podLabels"], "podAnnotations": KNOBS["podAnnotations"], **knobs}
    found = pod({**SHARED, "watch": {"enabled": True, **made}})
    assert {name: found["spec"][name] for name in knobs} == knobs
    assert KNOBS["podLabels"].items() <= found["metadata"]["labels"].items()
    assert KNOBS["podAnnotations"] == found["metadata"]["annotations"]
