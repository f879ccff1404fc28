"""JobSets, LeaderWorkerSets and the objects of Kueue are valid by the published schemas of their operators."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import jsonschema
import pytest
import yaml

from support.blocks import blocks
from support.helm import ROOT, Object, of_kind, one, render
from support.variations import VARIATIONS

pytestmark = pytest.mark.helm

PAGE = "docs/deploy/kubernetes-multinode.md"
QUEUE = "kueue.x-k8s.io/queue-name"


@functools.cache
def schemas() -> dict[str, Any]:
    """Return the schemas by API version and kind. tests/golden/record_crds.py records them."""
    return dict(json.loads((ROOT / "tests/golden/crds.json").read_text()))


def invalid(thing: Object) -> list[str]:
    schema = schemas()[f"{thing['apiVersion']} {thing['kind']}"]
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(thing)]


def examples() -> list[Object]:
    """Return the objects of Kueue on the page."""
    found = [yaml.safe_load(block.text) for block in blocks(PAGE, language="yaml")]
    return [thing for block in found if block.get("kind") == "List" for thing in block["items"]]


def queued_values() -> dict[str, Any]:
    (found,) = [yaml.safe_load(block.text) for block in blocks(PAGE, language="yaml") if f"{QUEUE}: gpus" in block.text]
    return dict(found)


@pytest.mark.parametrize("kind", ["JobSet", "LeaderWorkerSet"])
def test_every_object_of_an_operator_is_valid(kind: str) -> None:
    made = [thing for values in VARIATIONS.values() for thing in of_kind(render(values), kind)]
    assert made
    assert [problem for thing in made for problem in invalid(thing)] == []


@pytest.mark.parametrize(("kind", "field"), [("JobSet", "failurePolicy"), ("LeaderWorkerSet", "leaderWorkerTemplate")])
def test_an_unknown_field_and_a_wrong_type_are_detected(kind: str, field: str) -> None:
    thing = copy.deepcopy(next(t for t in render(VARIATIONS["multinode"]) if t["kind"] == kind))
    assert invalid({**thing, "spec": {**thing["spec"], "nosuchfield": 1}})
    assert invalid({**thing, "spec": {**thing["spec"], field: "text"}})


def test_the_objects_of_kueue_on_the_page_are_valid_and_belong_together() -> None:
    objects = examples()
    assert sorted(thing["kind"] for thing in objects) == ["ClusterQueue", "LocalQueue", "ResourceFlavor"]
    assert [problem for thing in objects for problem in invalid(thing)] == []
    cluster, local, flavor = (one(objects, kind) for kind in ("ClusterQueue", "LocalQueue", "ResourceFlavor"))
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,) = cluster["spec"]["resourceGroups"]
    assert [of["name"] for of in group["flavors"]] == [flavor["metadata"]["name"]]
    assert {of["name"] for of in group["flavors"][0]["resources"]} == set(group["coveredResources"])


@pytest.mark.parametrize("jobset", [False, True])
def test_a_trainer_that_queues_bears_the_name_of_the_queue_and_requests_only_what_the_queue_covers(
    jobset: bool,
) -> None:
    values = queued_values()
    assert "suspend" not in values["trainer"], "Kueue itself suspends what bears its label"
    made = one(render({**values, "trainer": {**values["trainer"], "jobSet": jobset}}), "JobSet" if jobset else "Job")
    local, cluster = one(examples(), "LocalQueue"), one(examples(), "ClusterQueue")
    assert made["metadata"]["labels"][QUEUE] == local["metadata"]["name"]
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"] if jobset else made["spec"]
    pod = spec["template"]["spec"]
    requested = {name for of in (*pod["initContainers"], *pod["containers"]) for name in of["resources"]["requests"]}
    assert requested <= set(cluster["spec"]["resourceGroups"][0]["coveredResources"])
