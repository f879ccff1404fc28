"""The network policies allow the connections that the stack needs, and no other: every pair of pods and every port."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from support.helm import Object, of_kind, pod_templates, render
from support.network_policies import Endpoint, allows, selects

pytestmark = pytest.mark.helm

SEVERAL = {
    "trainer": {"nodes": 2},
    "storage": {"runs": {"accessMode": "ReadWriteMany"}},
    "generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}},
}
ONLINE = {"offline": False, "networkPolicy": {"outsidePorts": [443, 3128]}}
COMPONENT = "app.kubernetes.io/component"
STRANGERS = {
    "neighbour": Endpoint({"app": "neighbour"}),
    "prometheus": Endpoint({"app": "prometheus"}, namespace="monitoring"),
    "stranger": Endpoint({COMPONENT: "trainer", "app.kubernetes.io/instance": "run"}, namespace="other"),
    "dns": Endpoint({"k8s-app": "kube-dns"}, namespace="kube-system"),
    "node-dns": Endpoint(address="169.254.20.10", is_pod=False),
    "hub": Endpoint(address="18.164.174.23", is_pod=False),
    "hub-ipv6": Endpoint(address="2600:9000:2752::1", is_pod=False),
    "api-server": Endpoint(address="10.96.0.1", is_pod=False),
    "cloud-metadata": Endpoint(address="169.254.169.254", is_pod=False),
}
PORTS = (22, 53, 80, 443, 3128, 6443, 8000, 8100, 8600, 9400, 29500, 45678)
Flow = tuple[str, str, int]


def endpoints(objects: list[Object], prefix: str = "") -> dict[str, Endpoint]:
    """Return the pods of a release by component, and with that a second pod of each."""
    found: dict[str, Endpoint] = {}
    for template in (template for thing in objects for template in pod_templates(thing)):
        labels = template["metadata"]["labels"]
        ports = {
            port["name"]: port["containerPort"] for of in template["spec"]["containers"] for port in of.get("ports", ())
        }
        found[f"{prefix}{labels[COMPONENT]}"] = Endpoint(labels, ports=ports)
    return found


def flows(values: dict[str, Any] | None = None, protocol: str = "TCP") -> set[Flow]:
    """Return every allowed connection between two releases in a namespace and strangers: (source, target, port)."""
    mine, theirs = render(values), render(values, release="other")
    policies = of_kind([*mine, *theirs], "NetworkPolicy")
    everybody = {**endpoints(mine), **endpoints(theirs, "other-"), **STRANGERS}
    own = endpoints(mine)
    return {
        (source, target, port)
        for (source, a), (target, b), port in product(everybody.items(), everybody.items(), PORTS)
        if (source in own or target in own) and a.is_pod and allows(policies, a, b, port, protocol)
    }


def dns(*pods: str, port: int = 53) -> set[Flow]:
    """Return the queries of these pods. DNS runs in another namespace under a name that the chart does not know."""
    resolvers = ("dns", "node-dns", "neighbour", "prometheus", "stranger")
    return {(pod, resolver, port) for pod in pods for resolver in resolvers}


BASE: set[Flow] = {
    ("trainer", "generator", 8000),
    ("test", "generator", 8000),
    ("prometheus", "generator", 8000),
    ("prometheus", "trainer", 9400),
}


def test_by_default_these_connections_are_allowed_and_no_other() -> None:
    assert flows() == BASE | dns("trainer", "generator", "test")
    assert flows(protocol="UDP") == dns("trainer", "generator", "test")


def test_only_the_trainers_pod_reaches_the_outside_and_only_without_offline() -> None:
    outside = {("trainer", target, port) for target in ("hub", "hub-ipv6") for port in (443, 3128)}
    assert flows(ONLINE) == BASE | dns("trainer", "generator", "test") | outside
    assert flows({**ONLINE, "offline": True}) == flows()
    assert flows({**ONLINE, "networkPolicy": {"outsidePorts": []}}) == flows()


def test_a_proxy_inside_the_cluster_can_be_reached_when_its_addresses_are_not_excepted() -> None:
    values = {"offline": False, "networkPolicy": {"outsideExcept": ["169.254.0.0/16"]}}
    found = {target for source, target, port in flows(values) - flows() if (source, port) == ("trainer", 443)}
    assert {"hub", "hub-ipv6", "neighbour", "api-server"} <= found
    assert "cloud-metadata" not in found


def test_nodes_of_one_service_reach_each_other_on_every_port() -> None:
    nodes = {("trainer", "trainer", port) for port in PORTS}
    nodes |= {
        (a, b, port)
        for a in ("generator", "generator-worker")
        for b in ("generator", "generator-worker")
        for port in PORTS
    }
    assert flows(SEVERAL) == BASE | nodes | dns("trainer", "generator", "generator-worker", "test")


def test_a_jobset_has_the_same_connections_as_a_job() -> None:
    assert flows({**SEVERAL, "trainer": {"nodes": 2, "jobSet": True}}) == flows(SEVERAL)


def test_the_monitoring_namespace_can_be_changed() -> None:
    values = {"networkPolicy": {"monitoringNamespace": "other"}}
    assert {flow for flow in flows(values) if flow[0] in STRANGERS} == {
        ("stranger", "generator", 8000),
        ("stranger", "trainer", 9400),
    }


def test_dns_may_listen_on_another_port() -> None:
    found = flows({"networkPolicy": {"dnsPorts": [53, 8000]}}, protocol="UDP")
    assert found == dns("trainer", "generator", "test") | dns("trainer", "generator", "test", port=8000)


def test_without_policies_everything_is_allowed() -> None:
    assert not of_kind(render({"networkPolicy": {"enabled": False}}), "NetworkPolicy")
    assert ("neighbour", "generator", 22) in flows({"networkPolicy": {"enabled": False}})


# -- the evaluation itself ---------------------------------------------------------------------------------------------

A, B = Endpoint({"a": "1"}, ports={"web": 80}), Endpoint({"b": "1"}, namespace="else")


def policy(**spec: Any) -> Object:
    return {"metadata": {}, "spec": {"podSelector": {"matchLabels": {"a": "1"}}, **spec}}


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"ingress": []}, False),
        ({"policyTypes": ["Egress"], "egress": []}, True),
        ({"ingress": [{}]}, True),
        ({"ingress": [{"from": [{"podSelector": {}}]}]}, False),
        ({"ingress": [{"from": [{"namespaceSelector": {}}]}]}, True),
        ({"ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"b": "2"}}}]}]}, False),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.244.0.0/16"]}}]}]}, False),
        ({"ingress": [{"ports": [{"port": "web"}]}]}, True),
        ({"ingress": [{"ports": [{"port": 70, "endPort": 90}]}]}, True),
        ({"ingress": [{"ports": [{"port": 80, "protocol": "UDP"}]}]}, False),
        ({"podSelector": {"matchLabels": {"a": "2"}}, "ingress": []}, True),
    ],
    ids=str,
)
def test_a_policy_means_what_kubernetes_says(spec: dict[str, Any], allowed: bool) -> None:
    assert allows([policy(**spec)], B, A, 80) is allowed


def test_policies_add_up_and_both_ends_must_allow() -> None:
    open_port = policy(ingress=[{"ports": [{"port": 80}]}])
    assert allows([policy(ingress=[]), open_port], B, A, 80)
    closed = {"metadata": {"namespace": "else"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"]}}
    assert not allows([open_port, closed], B, A, 80)


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ({"key": "a", "operator": "In", "values": ["1"]}, True),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, False),
        ({"key": "b", "operator": "NotIn", "values": ["1"]}, True),
        ({"key": "a", "operator": "Exists"}, True),
        ({"key": "a", "operator": "DoesNotExist"}, False),
    ],
    ids=str,
)
def test_a_selector_selects_by_expressions(expression: Object, selected: bool) -> None:
    assert selects({"matchExpressions": [expression]}, {"a": "1"}) is selected
