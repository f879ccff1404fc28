"""The network policies allow only the connections that the stack needs."""

from __future__ import annotations

from typing import Any

import pytest

from support.helm import Object, of_kind, render

pytestmark = pytest.mark.helm

DNS, GENERATOR, METRICS = {53}, {8000}, {9400}
EVERY: frozenset[int] = frozenset()
"""Stands for every port."""
SEVERAL = {
    "trainer": {"nodes": 2},
    "storage": {"runs": {"accessMode": "ReadWriteMany"}},
    "generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}},
}


def peer(of: Object) -> str:
    """Return the component, namespace or address block of a peer."""
    if "podSelector" in of:
        selector = of["podSelector"]
        component = selector.get("matchLabels", {}).get("app.kubernetes.io/component")
        return component or "+".join(selector["matchExpressions"][1]["values"])
    if "ipBlock" in of:
        return str(of["ipBlock"]["cidr"])
    labels = of["namespaceSelector"].get("matchLabels", {})
    return f"namespace {labels.get('kubernetes.io/metadata.name', '*')}"


def flows(values: dict[str, Any], direction: str) -> dict[tuple[str, str], set[int] | frozenset[int]]:
    """Return the allowed ports in one direction, by (component of the pods, peer)."""
    found: dict[tuple[str, str], set[int] | frozenset[int]] = {}
    for thing in of_kind(render(values), "NetworkPolicy"):
        own = peer(thing["spec"]) if not thing["metadata"]["name"].endswith("-deny") else "*"
        for rule in thing["spec"].get(direction, []):
            for other in rule["from" if direction == "ingress" else "to"]:
                found[own, peer(other)] = {port["port"] for port in rule["ports"]} if "ports" in rule else EVERY
    return found


def without_dns(all_flows: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    return {pair: ports for pair, ports in all_flows.items() if ports != DNS}


def test_only_the_trainer_the_test_and_monitoring_reach_a_generator() -> None:
    assert flows({}, "ingress") == {
        ("generator", "trainer"): GENERATOR,
        ("generator", "test"): GENERATOR,
        ("generator", "namespace monitoring"): GENERATOR,
        ("trainer", "namespace monitoring"): METRICS,
    }


def test_trainer_and_test_reach_only_the_generators_and_a_generator_reaches_nothing() -> None:
    assert without_dns(flows({}, "egress")) == {
        ("trainer", "generator"): GENERATOR,
        ("test", "generator"): GENERATOR,
    }


def test_dns_queries_go_only_to_the_cluster_and_the_node_cache() -> None:
    resolvers = {other for (_, other), ports in flows({}, "egress").items() if ports == DNS}
    assert resolvers == {"namespace *", "169.254.20.10/32"}


def test_only_the_trainer_reaches_the_outside_and_only_without_offline() -> None:
    values = {"offline": False, "networkPolicy": {"outsidePorts": [443, 3128]}}
    outside = {pair: ports for pair, ports in flows(values, "egress").items() if pair[1] == "0.0.0.0/0"}
    assert outside == {("trainer", "0.0.0.0/0"): {443, 3128}}
    assert not [pair for pair in flows({}, "egress") if pair[1] == "0.0.0.0/0"]
    assert not [pair for pair in flows({**values, "offline": True}, "egress") if pair[1] == "0.0.0.0/0"]


def test_nodes_of_one_service_reach_each_other_on_every_port() -> None:
    nodes = ("generator+generator-worker",) * 2
    for direction in ("ingress", "egress"):
        assert flows(SEVERAL, direction)["trainer", "trainer"] == EVERY
        assert flows(SEVERAL, direction)[nodes] == EVERY
        assert ("trainer", "trainer") not in flows({}, direction)
        assert nodes not in flows({}, direction)


def test_network_policies_can_be_disabled() -> None:
    assert not of_kind(render({"networkPolicy": {"enabled": False}}), "NetworkPolicy")


def test_the_monitoring_namespace_can_be_changed() -> None:
    pairs = flows({"networkPolicy": {"monitoringNamespace": "observability"}}, "ingress")
    assert ("generator", "namespace observability") in pairs
    assert ("generator", "namespace monitoring") not in pairs
