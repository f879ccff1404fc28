"""Sets of values that the chart must accept: those in ci/, and combinations of the values with the largest effect."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import yaml

from support.helm import CI_VALUES

Values = dict[str, Any]

OWN: Values = {"config": {"shared": {"model": "m"}, "trainer": {"max_steps": 1, "rewards": [{"function": "r:f"}]}}}
PROJECTS: dict[str, Values] = {
    "demo": {},
    "files": {**OWN, "project": {"files": {"r.py": "def f(): ..."}}},
    "map": {**OWN, "project": {"configMap": "mine"}},
    "claim": {**OWN, "project": {"existingClaim": "mine"}},
    "image": {**OWN, "project": {"imagePath": "/opt/mine"}},
}
SERVICES: dict[str, Values] = {
    "cpu": {},
    "gpu": {
        "generator": {"replicas": 2, "accelerator": {"count": 4}, "dataParallelSize": 2},
        "trainer": {"accelerator": {"resource": "nvidia.com/mig-3g.40gb", "count": 4}},
    },
    "nodes": {"trainer": {"nodes": 3}},
    "jobset": {"trainer": {"nodes": 2, "jobSet": True, "accelerator": {"count": 8}}},
    "groups": {"generator": {"nodesPerReplica": 2, "accelerator": {"count": 8}}},
}
STORAGE: dict[str, Values] = {
    "shared": {"storage": {"runs": {"accessMode": "ReadWriteMany"}}},
    "one-node": {"storage": {name: {"accessMode": "ReadWriteOnce"} for name in ("weights", "cache", "runs")}},
    "existing": {
        "storage": {
            name: {"existingClaim": f"my-{name}", "accessMode": "ReadWriteMany"} for name in ("weights", "runs")
        },
        "token": {"existingSecret": "mine", "key": "bearer"},
    },
}
REST: dict[str, Values] = {
    "plain": {},
    "all": {
        "offline": False,
        "huggingFace": {"existingSecret": "hub"},
        "monitoring": {name: {"enabled": True} for name in ("scrape", "rules", "dashboard")},
        "imagePullSecrets": [{"name": "registry"}],
        "fullnameOverride": "a-very-long-name-that-has-to-be-cut-somewhere-before-it-ends",
    },
}


SIDECAR = {
    "name": "sidecar",
    "image": "registry.example.com/sidecar:1",
    "restartPolicy": "Always",
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    },
    "resources": {key: {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"} for key in ("requests", "limits")},
}
SECRET = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "k"}}}
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
KNOBS: Values = {
    "labels": {"kueue.x-k8s.io/queue-name": "gpus", "team": "rl"},
    "annotations": {"example.com/owner": "me"},
    "podLabels": {"team": "rl"},
    "podAnnotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    "schedulerName": "volcano",
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [SPREAD],
    "extraEnv": [SECRET],
    "extraVolumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
    "extraVolumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
    "extraInitContainers": [SIDECAR],
}
"""Every value of a service that a platform team sets on workloads and pods."""


def _combined() -> dict[str, Values]:
    """Combine every SERVICES, STORAGE and REST, and give each combination the next of PROJECTS."""
    named = {}
    projects = cycle(PROJECTS.items())
    for parts in product(SERVICES.items(), STORAGE.items(), REST.items()):
        words = [name for name, _ in parts]
        if "one-node" in words and {"nodes", "jobset", "groups"} & {*words}:
            continue  # refused: test_helm_storage.py
        project, values = next(projects)
        named["-".join([*words, project])] = {k: v for _, part in parts for k, v in part.items()} | values
    return named


CI: dict[str, Values] = {file.name.removesuffix("-values.yaml"): yaml.safe_load(file.read_text()) for file in CI_VALUES}
VARIATIONS: dict[str, Values] = {
    "defaults": {},
    **CI,
    **_combined(),
    "knobs": {"generator": KNOBS, "trainer": {**KNOBS, "suspend": True}},
    "environment": {"environment": {"enabled": True, "replicas": 2}},
    "watch": {"watch": {"enabled": True}, **STORAGE["one-node"]},
    "environment, knobs": {
        "environment": {**KNOBS, "enabled": True, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}
    },
}
