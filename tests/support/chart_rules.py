"""Rules that every object of the chart follows: the restricted Pod Security Standard, and common platform rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from support.helm import Object, pod_templates

Rule = Callable[[Sequence[Object]], Iterator[str]]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
"""Kinds of volumes that the restricted Pod Security Standard allows."""
LABELS = {
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
    "app.kubernetes.io/version",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
}
SELECTING = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def violations(objects: Sequence[Object]) -> list[str]:
    return [problem for rule in RULES for problem in rule(objects)]


def quantity(text: str | int) -> float:
    """Convert a Kubernetes quantity to a number: `1Gi` → bytes, `500m` → 0.5 cores."""
    match = re.fullmatch(r"([0-9.]+)(m?)(\w*)", str(text))
    assert match is not None, text
    return float(match[1]) * (0.001 if match[2] else UNITS[match[3]])


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Yield each pod template, or Pod, with the name of its object."""
    for thing in objects:
        for template in pod_templates(thing):
            yield f"{thing['kind']} {thing['metadata']['name']}", template


def containers(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Yield each container and init container, with its location and the spec of its pod."""
    for where, template in pods(objects):
        for kind in ("initContainers", "containers"):
            for container in template["spec"].get(kind, []):
                yield f"{where}: {container['name']}", template["spec"], container


# -- the restricted Pod Security Standard ------------------------------------------------------------------------------


def no_host(objects: Sequence[Object]) -> Iterator[str]:
    for where, template in pods(objects):
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if template["spec"].get(name):
                yield f"{where} has {name}"
        for volume in template["spec"].get("volumes", []):
            if kinds := volume.keys() - {"name"} - VOLUMES:
                yield f"{where} has a volume of the kind {kinds}"
    for where, _, container in containers(objects):
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{where} has a hostPort"


def not_root(objects: Sequence[Object]) -> Iterator[str]:
    for where, template in pods(objects):
        context = template["spec"].get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{where} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where} has no seccomp profile"
    for where, _, container in containers(objects):
        if container.get("securityContext", {}).get("runAsUser") == 0:
            yield f"{where} runs as root"


def no_privileges(objects: Sequence[Object]) -> Iterator[str]:
    for where, _, container in containers(objects):
        context = container.get("securityContext", {})
        if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
            yield f"{where} may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where} has capabilities"


# -- rules of a platform team ------------------------------------------------------------------------------------------


def read_only_root(objects: Sequence[Object]) -> Iterator[str]:
    for where, _, container in containers(objects):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{where} may write to its root"


def no_api_token(objects: Sequence[Object]) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] == "ServiceAccount" and thing.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {thing['metadata']['name']} hands out its token"
    for where, template in pods(objects):
        if template["spec"].get("automountServiceAccountToken") is not False:
            yield f"{where} mounts a token of the Kubernetes API"
        # The checks before an upgrade may run before the release has its own.
        if template["spec"].get("serviceAccountName") in (None, "default") and "-check-" not in where:
            yield f"{where} has the default ServiceAccount"
        if template["spec"].get("enableServiceLinks") is not False:
            yield f"{where} gets an environment variable for every Service"


def bounded(objects: Sequence[Object]) -> Iterator[str]:
    """Requests and limits are set, and equal for devices. Volumes in memory fit into half of the memory limit."""
    for where, spec, container in containers(objects):
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for name in ("cpu", "memory", "ephemeral-storage"):
            if name not in requests or name not in limits:
                yield f"{where} has no {name} request or limit"
            elif quantity(requests[name]) > quantity(limits[name]):
                yield f"{where} requests more {name} than its limit"
        devices = {name for name in {*requests, *limits} if "/" in name}
        yield from (
            f"{where} has a limit of {name} that differs from its request"
            for name in devices
            if requests.get(name) != limits.get(name)
        )
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        shm = [
            volume["emptyDir"].get("sizeLimit", "1Ti")
            for volume in spec["volumes"]
            if volume["name"] in mounted and volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        if sum(map(quantity, shm)) > quantity(limits.get("memory", 0)) / 2:
            yield f"{where}: volumes in memory take more than half of the memory limit"
    for where, template in pods(objects):
        for volume in template["spec"]["volumes"]:
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{where}: the emptyDir {volume['name']} has no limit"


def probed(objects: Sequence[Object]) -> Iterator[str]:
    """Every container that serves has probes. The pods of a Job end by themselves and need none."""
    for where, spec, container in containers(objects):
        if container.get("ports") and spec.get("restartPolicy", "Always") == "Always":
            missing = {"startupProbe", "readinessProbe", "livenessProbe"} - container.keys()
            yield from (f"{where} has no {name}" for name in sorted(missing))


def images_are_named(objects: Sequence[Object]) -> Iterator[str]:
    for where, _, container in containers(objects):
        _, _, tag = container["image"].rpartition("/")[2].partition("@" if "@" in container["image"] else ":")
        if tag in ("", "latest"):
            yield f"{where} has the image {container['image']}, whose tag can change"


def labelled(objects: Sequence[Object]) -> Iterator[str]:
    for thing in objects:
        where = f"{thing['kind']} {thing['metadata']['name']}"
        if missing := LABELS - thing["metadata"].get("labels", {}).keys():
            yield f"{where} lacks the labels {sorted(missing)}"
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", thing["metadata"]["name"]):
            yield f"{where}: the name is not a DNS label"
    for where, template in pods(objects):
        if missing := SELECTING - template["metadata"]["labels"].keys():
            yield f"{where}: its pods lack the labels {sorted(missing)}"


def selectors_find_pods(objects: Sequence[Object]) -> Iterator[str]:
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    for thing in objects:
        for selector in _selectors(thing):
            expected = {k: v for k, v in selector.items() if not k.startswith("batch.kubernetes.io/")}
            if not any(expected.items() <= found.items() for found in labels):
                yield f"{thing['kind']} {thing['metadata']['name']} selects no pod of the chart: {selector}"


def _selectors(thing: Object) -> Iterator[dict[str, str]]:
    spec = thing.get("spec", {})
    match thing["kind"]:
        case "Service":
            yield spec["selector"]
        case "NetworkPolicy":
            peers = [peer for rule in spec.get("ingress", []) for peer in rule["from"]]
            peers += [peer for rule in spec.get("egress", []) for peer in rule["to"]]
            for selector in [spec["podSelector"], *(peer["podSelector"] for peer in peers if "podSelector" in peer)]:
                yield selector.get("matchLabels", {})
        case "PodDisruptionBudget" | "StatefulSet" | "PodMonitor":
            yield spec["selector"]["matchLabels"]


def everything_is_denied_first(objects: Sequence[Object]) -> Iterator[str]:
    denying = [
        thing["spec"]["podSelector"].get("matchLabels", {})
        for thing in objects
        if thing["kind"] == "NetworkPolicy" and not {"ingress", "egress"} & thing["spec"].keys()
        if set(thing["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    ]
    for where, template in pods(objects):
        if not any(selector.items() <= template["metadata"]["labels"].items() for selector in denying):
            yield f"{where} is in no NetworkPolicy that denies everything"


def references_are_there(objects: Sequence[Object]) -> Iterator[str]:
    """Every mounted volume is declared. Every ConfigMap, Secret and claim named after the release is rendered."""
    made = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    release = next(thing["metadata"]["name"] for thing in objects if thing["kind"] == "ServiceAccount")
    for where, template in pods(objects):
        for volume in template["spec"]["volumes"]:
            for kind, name in (
                ("ConfigMap", volume.get("configMap", {}).get("name")),
                ("Secret", volume.get("secret", {}).get("secretName")),
                ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
            ):
                if name and name.startswith(f"{release}-") and (kind, name) not in made:
                    yield f"{where}: there is no {kind} {name}"
    for where, spec, container in containers(objects):
        declared = {volume["name"] for volume in spec["volumes"]}
        unknown = {mount["name"] for mount in container.get("volumeMounts", [])} - declared
        yield from (f"{where} mounts the unknown volume {name}" for name in unknown)


RESTRICTED: tuple[Rule, ...] = (no_host, not_root, no_privileges)
"""What the label `pod-security.kubernetes.io/enforce: restricted` of a namespace refuses."""
RULES: tuple[Rule, ...] = (
    *RESTRICTED,
    read_only_root,
    no_api_token,
    bounded,
    probed,
    images_are_named,
    labelled,
    selectors_find_pods,
    everything_is_denied_first,
    references_are_there,
)
