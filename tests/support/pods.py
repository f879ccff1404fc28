"""Converts the pods of a rendered chart to the form that podman 4.3's `kube play` accepts.

They come from StatefulSets, Deployments, Jobs and Pods. podman does not support NetworkPolicies, disruption budgets,
monitors, JobSets and LeaderWorkerSets.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from support.helm import Object

PLAYED = {
    "pod's metadata": {"labels"},
    "pod": {"containers", "volumes", "securityContext"},
    "container": {"name", "image", "command", "args", "env", "resources", "securityContext", "volumeMounts"},
    "security of a pod": {"runAsUser", "runAsGroup"},
    "security of a container": {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"},
    "mount": {"name", "mountPath", "readOnly"},
}
"""Fields that podman gets as they were rendered."""

NOT_PLAYED = {
    "pod's metadata": {
        "name": "replaced: names begin with the cluster's name",
        "annotations": "podman allows only 63 characters per value; variables that refer to them are filled in here",
    },
    "pod": {
        "initContainers": "podman locks the pod while they run, so each one runs earlier in a separate pod",
        "restartPolicy": "replaced: `Pod.restart`, and Never for init containers",
        "terminationGracePeriodSeconds": "not supported; `Cluster.stop` waits that long",
        "subdomain": "not supported; the pod's names are aliases on the network",
        "serviceAccountName": "there is no API server",
        "automountServiceAccountToken": "there is no API server",
        "enableServiceLinks": "there is no API server",
        "imagePullSecrets": "images come from the Docker engine",
        "affinity": "there is one node",
        "topologySpreadConstraints": "there is one node",
        "nodeSelector": "there is one node",
        "tolerations": "there is one node",
        "priorityClassName": "there is one node",
    },
    "container": {
        "imagePullPolicy": "images come from the Docker engine; podman would pull them from a registry",
        "ports": "podman would publish each on the host; `Pod.port` finds them by name",
        "startupProbe": "not supported; support.probes sends it",
        "readinessProbe": "not supported; support.probes sends it",
        "livenessProbe": "podman would need systemd, and curl in the image; support.probes sends it",
        "lifecycle": "not supported; `Cluster.stop` runs preStop",
    },
    "security of a pod": {
        "runAsNonRoot": "not supported; the tests check the user",
        "fsGroup": "not supported; volumes are created with that group",
        "fsGroupChangePolicy": "not needed: volumes are new",
        "seccompProfile": "podman's default is RuntimeDefault",
    },
    "mount": {"subPath": "not supported; the folder itself is mounted, as a hostPath"},
}
"""Fields that podman does not get, with the reason. A field in neither table fails the test."""


class Volumes(Protocol):
    """Creates the volumes of a cluster and returns their names."""

    def claim(self, name: str, group: int) -> str: ...
    def scratch(self, name: str, size: str, group: int) -> str: ...
    def folder(self, claim: str, path: str) -> Path: ...
    def own(self, name: str) -> str: ...


@dataclass(frozen=True)
class Pod:
    """A pod as its controller creates it. It is never changed."""

    name: str
    template: Object
    restart: str
    names: tuple[str, ...]
    """DNS names that Services give it."""
    annotations: dict[str, str] = field(default_factory=dict)
    env: tuple[Object, ...] = ()
    """Variables that Kubernetes adds to every container."""

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def component(self) -> str:
        return self.template["metadata"]["labels"]["app.kubernetes.io/component"]

    @property
    def container(self) -> Object:
        (only,) = self.spec["containers"]
        return only

    @property
    def group(self) -> int:
        """The group of the files on its volumes."""
        return self.spec["securityContext"].get("fsGroup", 0)

    @property
    def inits(self) -> list[Object]:
        return self.spec.get("initContainers", [])

    def port(self, name: str | int) -> int:
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        return name if isinstance(name, int) else ports[name]


def lift(objects: Sequence[Object]) -> list[Pod]:
    """Return the pods that Kubernetes would create from a rendered chart."""
    return [pod for thing in objects for pod in _pods_of(thing, objects)]


def _pods_of(thing: Object, objects: Sequence[Object]) -> Iterator[Pod]:
    name, spec = thing["metadata"]["name"], thing.get("spec", {})
    if thing["kind"] == "StatefulSet":
        template = {**spec["template"], "spec": {"subdomain": spec["serviceName"], **spec["template"]["spec"]}}
        for index in range(spec["replicas"]):
            yield Pod(f"{name}-{index}", template, "Always", _names(f"{name}-{index}", template, objects))
    if thing["kind"] == "Deployment":
        for index in range(spec["replicas"]):
            yield Pod(f"{name}-{index}", spec["template"], "Always", _names(name, spec["template"], objects))
    if thing["kind"] == "Pod":
        yield Pod(name, thing, spec["restartPolicy"], ())
    if thing["kind"] == "Job":
        for index in range(spec["completions"]):
            pod, template = f"{name}-{index}", spec["template"]
            extra: Object = {}
            if spec["completionMode"] == "Indexed":
                extra = {
                    "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
                    "env": ({"name": "JOB_COMPLETION_INDEX", "value": str(index)},),
                }
            yield Pod(pod, template, template["spec"]["restartPolicy"], _names(pod, template, objects), **extra)


def _names(pod: str, template: Object, objects: Sequence[Object]) -> tuple[str, ...]:
    """Return the names `service` and `pod.service` for each Service that selects the pod."""
    found: list[str] = []
    for service in (thing for thing in objects if thing["kind"] == "Service"):
        name = service["metadata"]["name"]
        if service["spec"]["selector"].items() <= template["metadata"]["labels"].items():
            found += [name, f"{pod}.{name}"] if template["spec"].get("subdomain") == name else [name]
    return tuple(found)


def manifest(pod: Pod, objects: Sequence[Object], volumes: Volumes, init: Object | None = None) -> list[Object]:
    """Return the documents for `podman kube play` of a pod, or of one of its init containers."""
    spec = _take("pod", pod.spec)
    container, sources, maps = _container(pod, init or pod.container, objects, volumes)
    spec |= {
        "hostname": pod.name,
        "restartPolicy": "Never" if init else pod.restart,
        "securityContext": _take("security of a pod", spec["securityContext"]),
        "containers": [container],
        "volumes": sources,
    }
    name = volumes.own(f"{pod.name}-{init['name']}" if init else pod.name)
    metadata = {**_take("pod's metadata", pod.template["metadata"]), "name": name}
    return [*maps, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}]


def _take(where: str, thing: Object) -> Object:
    played, not_played = PLAYED[where], NOT_PLAYED.get(where, {})
    assert not (new := thing.keys() - played - not_played.keys()), (
        f"a {where} has the unknown fields {new}. Fix: add them to PLAYED or NOT_PLAYED"
    )
    return {key: value for key, value in thing.items() if key in played}


def _container(
    pod: Pod, container: Object, objects: Sequence[Object], volumes: Volumes
) -> tuple[Object, list[Object], list[Object]]:
    """Return the container, the volumes that it mounts and their ConfigMaps."""
    sources = {}
    mounts = []
    maps: list[Object] = []
    by_name = {volume["name"]: volume for volume in pod.spec["volumes"]}
    for number, mount in enumerate(container.get("volumeMounts", [])):
        volume = by_name[mount["name"]]
        name = f"v{number}"
        sources[name] = _source(pod, volume, mount.get("subPath"), volumes, objects, maps)
        read_only = {"readOnly": True} if volume.get("persistentVolumeClaim", {}).get("readOnly") else {}
        mounts.append({**_take("mount", mount), "name": name, **read_only})
    made = {
        **_take("container", container),
        "imagePullPolicy": "Never",
        "env": [*pod.env, *(_variable(pod, variable) for variable in container.get("env", []))],
        "securityContext": _take("security of a container", container["securityContext"]),
        "volumeMounts": mounts,
    }
    return made, [{"name": name, **source} for name, source in sources.items()], maps


def _variable(pod: Pod, variable: Object) -> Object:
    """Fill in variables that refer to fields: podman supports few fields of the downward API."""
    match variable:
        case {"value": _}:
            return variable
        case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
            return {"name": name, "value": pod.name}
        case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} if "annotations" in path:
            (key,) = re.findall(r"\['(.+)'\]", path)
            return {"name": name, "value": pod.annotations[key]}
    raise AssertionError(f"{variable} is not supported yet")


def _source(
    pod: Pod, volume: Object, sub_path: str | None, volumes: Volumes, objects: Sequence[Object], maps: list[Object]
) -> Object:
    """Return what podman mounts for a volume. Appends its ConfigMap to `maps`, if it has one.

    Three things differ from kubelet: an emptyDir on disk is in memory, too; it is empty again after an init container;
    and all users can read the files of ConfigMaps and Secrets, whatever their `defaultMode` is.
    """
    own = f"{pod.name}-{volume['name']}"
    match volume:
        case {"persistentVolumeClaim": {"claimName": claim}} if sub_path:
            return {"hostPath": {"path": str(volumes.folder(claim, sub_path)), "type": "DirectoryOrCreate"}}
        case {"persistentVolumeClaim": {"claimName": claim}}:
            return {"persistentVolumeClaim": {"claimName": volumes.claim(claim, pod.group)}}
        case {"emptyDir": {"sizeLimit": size}}:
            return {"persistentVolumeClaim": {"claimName": volumes.scratch(own, size, pod.group)}}
        case {"configMap": {"name": name} as options}:
            files = _find(objects, "ConfigMap", name).get("data", {})
        case {"secret": {"secretName": name} as options}:  # podman 4.3 mounts a Secret's base64, all keys of it
            encoded = _find(objects, "Secret", name)["data"]
            files = {key: base64.b64decode(text).decode() for key, text in encoded.items()}
        case _:
            raise AssertionError(f"the volume {volume} is not supported yet")
    if items := options.get("items"):
        files = {item["path"]: files[item["key"]] for item in items}
    maps.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": volumes.own(own)}, "data": files})
    return {"configMap": {"name": volumes.own(own)}}


def _find(objects: Sequence[Object], kind: str, name: str) -> Object:
    (found,) = [thing for thing in objects if thing["kind"] == kind and thing["metadata"]["name"] == name]
    return found
