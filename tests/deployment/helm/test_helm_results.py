"""The pod that a page gives for copying results may run in a `restricted` namespace, on the claim of the chart."""

from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from support.blocks import blocks, commands
from support.chart_rules import RESTRICTED, bounded, images_are_named, read_only_root
from support.helm import Object, names, one, render

pytestmark = pytest.mark.helm

PAGE = "docs/deploy/kubernetes.md"


def pod() -> Object:
    (found,) = [yaml.safe_load(b.text) for b in blocks(PAGE, language="yaml") if b.text.startswith("# results.yaml")]
    return found


def test_a_restricted_namespace_accepts_the_pod() -> None:
    rules = (*RESTRICTED, read_only_root, bounded, images_are_named)
    assert [problem for rule in rules for problem in rule([pod()])] == []
    kubernetes_validate.validate(pod(), kubernetes_validate.latest_version(), strict=True)


def test_every_command_of_the_page_that_starts_a_pod_uses_a_manifest() -> None:
    words = [command.words for block in blocks(PAGE, language="sh") for command in commands(block.text)]
    kubectl = [word for of in words if of[0] == "kubectl" for word in of]
    assert "apply" in kubectl
    assert "run" not in kubectl, "`kubectl run` starts a pod without the security context that the namespace demands"


def test_the_pod_mounts_the_runs_of_a_release_as_the_user_and_group_that_wrote_them() -> None:
    objects = render(release="mine")
    (volume,) = pod()["spec"]["volumes"]
    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names(objects)
    trainer = one(objects, "Job")["spec"]["template"]["spec"]
    assert pod()["spec"]["securityContext"] == trainer["securityContext"]
    (container,), (writer,) = pod()["spec"]["containers"], trainer["containers"]
    assert container["image"] == writer["image"]
    (mount,) = container["volumeMounts"]
    assert {**mount, "readOnly": False} == {"name": "runs", "mountPath": "/runs", "readOnly": False}
    assert mount["readOnly"]


def test_no_policy_of_the_chart_concerns_the_pod() -> None:
    assert "labels" not in pod()["metadata"]
