"""Which connections Kubernetes' network policies allow: an evaluation of the rendered objects.

A pod that a policy selects may have only the connections that a rule of some policy for it allows. A connection needs
both: egress of its source and ingress of its target. Kubelet's probes come from the node, and no policy concerns them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from support.helm import Object

Labels = Mapping[str, str]
NAMESPACE = "rl"
NAME_LABEL = "kubernetes.io/metadata.name"
"""The label that Kubernetes gives each namespace."""


@dataclass(frozen=True)
class Endpoint:
    """One end of a connection: a pod, or an address outside the cluster."""

    labels: Labels = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = "10.244.0.9"
    is_pod: bool = True
    ports: Mapping[str, int] = field(default_factory=dict)
    """Named ports of its containers."""


def allows(policies: Sequence[Object], source: Endpoint, target: Endpoint, port: int, protocol: str = "TCP") -> bool:
    """Return whether `source` may connect to a port of `target`."""
    return _direction(policies, "egress", source, target, target, port, protocol) and _direction(
        policies, "ingress", target, source, target, port, protocol
    )


def _direction(
    policies: Sequence[Object],
    direction: str,
    own: Endpoint,
    other: Endpoint,
    target: Endpoint,
    port: int,
    protocol: str,
) -> bool:
    concerned = [policy["spec"] for policy in policies if direction in _types(policy["spec"]) and _is_in(own, policy)]
    if not concerned:
        return True
    peers = "to" if direction == "egress" else "from"
    return any(
        _is_peer(rule.get(peers), other) and _is_port(rule.get("ports"), target, port, protocol)
        for spec in concerned
        for rule in spec.get(direction) or ()
    )


def _types(spec: Object) -> Iterator[str]:
    default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    yield from (name.lower() for name in spec.get("policyTypes", default))


def _is_in(pod: Endpoint, policy: Object) -> bool:
    namespace = policy["metadata"].get("namespace", NAMESPACE)
    return pod.is_pod and pod.namespace == namespace and selects(policy["spec"]["podSelector"], pod.labels)


def _is_peer(peers: Sequence[Object] | None, other: Endpoint) -> bool:
    return not peers or any(_matches(peer, other) for peer in peers)


def _matches(peer: Object, other: Endpoint) -> bool:
    if block := peer.get("ipBlock"):
        return _contains(block["cidr"], other) and not any(_contains(cidr, other) for cidr in block.get("except", ()))
    if not other.is_pod:
        return False
    spaces = peer.get("namespaceSelector")
    in_namespace = other.namespace == NAMESPACE if spaces is None else selects(spaces, {NAME_LABEL: other.namespace})
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)


def _contains(cidr: str, other: Endpoint) -> bool:
    return ipaddress.ip_address(other.address) in ipaddress.ip_network(cidr)  # False for the other family


def _is_port(ports: Sequence[Object] | None, target: Endpoint, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for of in ports:
        if of.get("protocol", "TCP") != protocol:
            continue
        first: int | None = target.ports.get(of["port"]) if isinstance(of.get("port"), str) else of.get("port", port)
        if first is not None and first <= port <= (of.get("endPort") or first):
            return True
    return False


def selects(selector: Object, labels: Labels) -> bool:
    """Return whether a label selector selects an object with these labels. An empty one selects everything."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(_expression(of, labels) for of in selector.get("matchExpressions", ()))


def _expression(of: Object, labels: Labels) -> bool:
    match of["operator"]:
        case "In":
            return labels.get(of["key"]) in of["values"]
        case "NotIn":
            return labels.get(of["key"]) not in of["values"]
        case "Exists":
            return of["key"] in labels
        case "DoesNotExist":
            return of["key"] not in labels
    raise AssertionError(f"the operator {of['operator']} is unknown")
