"""Every object that the chart renders follows the rules of support/chart_rules.py, which detect every violation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from support import chart_rules
from support.chart_rules import violations
from support.helm import Object, one, render
from support.variations import VARIATIONS

pytestmark = pytest.mark.helm


def test_every_object_follows_the_rules_with_every_set_of_values() -> None:
    problems = {name: violations(render(values, upgrade=True)) for name, values in VARIATIONS.items()}
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


BREAKS: list[tuple[chart_rules.Rule, Callable[[list[Object]], Any]]] = [
    (chart_rules.no_host, lambda o: generator(o)["spec"].update(hostNetwork=True)),
    (chart_rules.no_host, lambda o: generator(o)["spec"]["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
    (chart_rules.no_host, lambda o: container(o)["ports"][0].update(hostPort=80)),
    (chart_rules.not_root, lambda o: generator(o)["spec"]["securityContext"].pop("runAsNonRoot")),
    (chart_rules.not_root, lambda o: generator(o)["spec"]["securityContext"].pop("seccompProfile")),
    (chart_rules.not_root, lambda o: init(o)["securityContext"].update(runAsUser=0)),
    (chart_rules.no_privileges, lambda o: init(o)["securityContext"].pop("allowPrivilegeEscalation")),
    (chart_rules.no_privileges, lambda o: container(o)["securityContext"].update(privileged=True)),
    (chart_rules.no_privileges, lambda o: container(o)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    (chart_rules.read_only_root, lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    (chart_rules.no_api_token, lambda o: one(o, "ServiceAccount").pop("automountServiceAccountToken")),
    (chart_rules.no_api_token, lambda o: generator(o)["spec"].pop("automountServiceAccountToken")),
    (chart_rules.no_api_token, lambda o: generator(o)["spec"].pop("serviceAccountName")),
    (chart_rules.no_api_token, lambda o: generator(o)["spec"].pop("enableServiceLinks")),
    (chart_rules.bounded, lambda o: container(o)["resources"]["limits"].pop("memory")),
    (chart_rules.bounded, lambda o: init(o)["resources"]["requests"].update(cpu="64")),
    (chart_rules.bounded, lambda o: container(o)["resources"]["limits"].update({"nvidia.com/gpu": "1"})),
    (chart_rules.bounded, lambda o: container(o)["resources"]["limits"].update(memory="1536Mi")),
    (chart_rules.bounded, lambda o: generator(o)["spec"]["volumes"][0]["emptyDir"].clear()),
    (chart_rules.probed, lambda o: container(o).pop("livenessProbe")),
    (chart_rules.images_are_named, lambda o: container(o).update(image="registry:5000/generator")),
    (chart_rules.images_are_named, lambda o: init(o).update(image="trainer:latest")),
    (chart_rules.labelled, lambda o: one(o, "Secret")["metadata"]["labels"].pop("helm.sh/chart")),
    (chart_rules.labelled, lambda o: one(o, "Secret")["metadata"].update(name="x" * 64)),
    (chart_rules.labelled, lambda o: generator(o)["metadata"]["labels"].pop("app.kubernetes.io/component")),
    (chart_rules.selectors_find_pods, lambda o: one(o, "Service")["spec"]["selector"].update(a="b")),
    (chart_rules.selectors_find_pods, lambda o: selector(o, "PodDisruptionBudget").update(a="b")),
    (chart_rules.selectors_find_pods, lambda o: selector(o, "NetworkPolicy", "-test", "podSelector").update(a="b")),
    (chart_rules.everything_is_denied_first, without("NetworkPolicy", "-deny")),
    (chart_rules.everything_is_denied_first, lambda o: one(o, "NetworkPolicy", "-deny")["spec"]["policyTypes"].pop()),
    (chart_rules.references_are_there, without("Secret")),
    (chart_rules.references_are_there, without("PersistentVolumeClaim", "-runs")),
    (chart_rules.references_are_there, lambda o: init(o)["volumeMounts"].append({"name": "no", "mountPath": "/no"})),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "breaks"), BREAKS, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BREAKS)])
def test_each_rule_detects_a_violation(rule: chart_rules.Rule, breaks: Callable[[list[Object]], Any]) -> None:
    objects = copy.deepcopy(render())
    assert not list(rule(objects))
    breaks(objects)
    assert list(rule(objects))


def test_every_rule_has_a_violation_to_detect() -> None:
    assert {rule for rule, _ in BREAKS} == set(chart_rules.RULES)
