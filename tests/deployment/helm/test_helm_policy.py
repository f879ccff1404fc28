"""Everything that the chart can make keeps the policy, and each rule of the policy notices what breaks it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from support import policy
from support.helm import Object, one, render
from support.policy import violations
from support.variations import VARIATIONS

pytestmark = pytest.mark.helm


def test_whatever_the_values_every_object_keeps_the_policy() -> None:
    problems = {name: violations(render(values)) for name, values in VARIATIONS.items()}
    assert {name: found for name, found in problems.items() if found} == {}


def generator(objects: list[Object]) -> Any:
    return one(objects, "StatefulSet")["spec"]["template"]


def container(objects: list[Object]) -> Any:
    return generator(objects)["spec"]["containers"][0]


def init(objects: list[Object]) -> Any:
    return one(objects, "Job")["spec"]["template"]["spec"]["initContainers"][0]


def selector(objects: list[Object], kind: str, suffix: str = "", key: str = "selector") -> Any:
    return one(objects, kind, suffix)["spec"][key]["matchLabels"]


def without(kind: str, suffix: str = "") -> Callable[[list[Object]], None]:
    return lambda objects: objects.remove(one(objects, kind, suffix))


BREAKS: list[tuple[policy.Rule, Callable[[list[Object]], Any]]] = [
    (policy.no_host, lambda o: generator(o)["spec"].update(hostNetwork=True)),
    (policy.no_host, lambda o: generator(o)["spec"]["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
    (policy.no_host, lambda o: container(o)["ports"][0].update(hostPort=80)),
    (policy.not_root, lambda o: generator(o)["spec"]["securityContext"].pop("runAsNonRoot")),
    (policy.not_root, lambda o: generator(o)["spec"]["securityContext"].pop("seccompProfile")),
    (policy.not_root, lambda o: init(o)["securityContext"].update(runAsUser=0)),
    (policy.no_privileges, lambda o: init(o)["securityContext"].pop("allowPrivilegeEscalation")),
    (policy.no_privileges, lambda o: container(o)["securityContext"].update(privileged=True)),
    (policy.no_privileges, lambda o: container(o)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    (policy.read_only_root, lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    (policy.no_api_token, lambda o: one(o, "ServiceAccount").pop("automountServiceAccountToken")),
    (policy.no_api_token, lambda o: generator(o)["spec"].pop("automountServiceAccountToken")),
    (policy.no_api_token, lambda o: generator(o)["spec"].pop("serviceAccountName")),
    (policy.no_api_token, lambda o: generator(o)["spec"].pop("enableServiceLinks")),
    (policy.bounded, lambda o: container(o)["resources"]["limits"].pop("memory")),
    (policy.bounded, lambda o: init(o)["resources"]["requests"].update(cpu="64")),
    (policy.bounded, lambda o: container(o)["resources"]["limits"].update({"nvidia.com/gpu": "1"})),
    (policy.bounded, lambda o: container(o)["resources"]["limits"].update(memory="1536Mi")),
    (policy.bounded, lambda o: generator(o)["spec"]["volumes"][0]["emptyDir"].clear()),
    (policy.probed, lambda o: container(o).pop("livenessProbe")),
    (policy.images_are_named, lambda o: container(o).update(image="registry:5000/generator")),
    (policy.images_are_named, lambda o: init(o).update(image="trainer:latest")),
    (policy.labelled, lambda o: one(o, "Secret")["metadata"]["labels"].pop("helm.sh/chart")),
    (policy.labelled, lambda o: one(o, "Secret")["metadata"].update(name="x" * 64)),
    (policy.labelled, lambda o: generator(o)["metadata"]["labels"].pop("app.kubernetes.io/component")),
    (policy.selectors_find_pods, lambda o: one(o, "Service")["spec"]["selector"].update(a="b")),
    (policy.selectors_find_pods, lambda o: selector(o, "PodDisruptionBudget").update(a="b")),
    (policy.selectors_find_pods, lambda o: selector(o, "NetworkPolicy", "-test", "podSelector").update(a="b")),
    (policy.everything_is_denied_first, without("NetworkPolicy", "-deny")),
    (policy.everything_is_denied_first, lambda o: one(o, "NetworkPolicy", "-deny")["spec"]["policyTypes"].pop()),
    (policy.references_are_there, without("Secret")),
    (policy.references_are_there, without("PersistentVolumeClaim", "-runs")),
    (policy.references_are_there, lambda o: init(o)["volumeMounts"].append({"name": "none", "mountPath": "/none"})),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "breaks"), BREAKS, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BREAKS)])
def test_what_breaks_a_rule_is_noticed_by_it(rule: policy.Rule, breaks: Callable[[list[Object]], Any]) -> None:
    objects = copy.deepcopy(render())
    assert not list(rule(objects))
    breaks(objects)
    assert list(rule(objects))


def test_every_rule_is_broken_once() -> None:
    assert {rule for rule, _ in BREAKS} == set(policy.RULES)
