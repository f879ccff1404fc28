"""Install, upgrade, roll back and uninstall a release with a real helm and a fake Kubernetes API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.helm import CHART, Object, helm
from support.kube_api import KubeApi, kube_api

pytestmark = pytest.mark.helm


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with kube_api() as made:
        yield made


def run(api: KubeApi, *words: str, values: tuple[str, ...] = ()) -> None:
    chart = [str(CHART), "--disable-openapi-validation"] if words[0] in ("install", "upgrade") else []
    sets = [word for value in values for word in ("--set", value)]
    done = helm(*words, "run", *chart, "--namespace", "rl", "--kube-apiserver", api.url, *sets)
    assert done.returncode == 0, done.stderr


def job(api: KubeApi) -> Object:
    (name,) = api.names("Job")
    return api.get("Job", name)


def token(api: KubeApi) -> str:
    return str(api.get("Secret", "run-tandem-token")["data"]["token"])


def test_an_upgrade_keeps_token_and_claims_and_replaces_a_changed_job(api: KubeApi) -> None:
    run(api, "install")
    first = job(api)
    first_token = token(api)
    claims = api.names("PersistentVolumeClaim")
    run(api, "upgrade", values=("generator.replicas=2",))
    assert job(api) == first
    assert api.get("StatefulSet", "run-tandem-generator")["spec"]["replicas"] == 2
    run(api, "upgrade", values=("config.trainer.max_steps=300",))
    assert job(api)["metadata"]["name"] != first["metadata"]["name"]
    assert "max_steps: 300" in api.get("ConfigMap", "run-tandem-config")["data"]["config.yaml"]
    assert token(api) == first_token
    assert api.names("PersistentVolumeClaim") == claims
    run(api, "rollback")
    assert job(api)["metadata"]["name"] == first["metadata"]["name"]
    assert token(api) == first_token


def test_uninstalling_keeps_the_runs_claim_and_installing_again_adopts_it(api: KubeApi) -> None:
    run(api, "install")
    first = token(api)
    run(api, "uninstall")
    assert set(api.objects) == {("persistentvolumeclaims", "run-tandem-runs")}
    run(api, "install")
    assert "run-tandem-runs" in api.names("PersistentVolumeClaim")
    assert token(api) != first


@pytest.mark.parametrize("claim", ["run-tandem-weights", "run-tandem-cache", "run-tandem-runs", "mine"])
def test_a_claim_that_is_being_deleted_is_refused(api: KubeApi, claim: str) -> None:
    """`helm uninstall` without --wait returns while the pods end, and Kubernetes keeps their claims until then."""
    own = ("storage.cache.existingClaim=mine",) if claim == "mine" else ()
    api.objects["persistentvolumeclaims", claim] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim, "namespace": "rl", "deletionTimestamp": "2026-11-26T00:00:00Z"},
    }
    before = dict(api.objects)
    for command in ("install", "upgrade"):
        with pytest.raises(AssertionError, match=f"the claim {claim}: got one that is being deleted"):
            run(api, command, *(["--install"] if command == "upgrade" else []), values=own)
    assert api.objects == before
    del api.objects["persistentvolumeclaims", claim]
    run(api, "install", values=own)


def test_kubernetes_accepts_an_upgrade_from_the_demo_to_cpu_and_mock_values_and_back(api: KubeApi) -> None:
    run(api, "install")
    for name in ("cpu", "mock"):
        run(api, "upgrade", "--values", str(CHART / f"ci/{name}-values.yaml"))
        run(api, "upgrade")


def test_the_fake_api_refuses_a_change_of_an_immutable_field(api: KubeApi) -> None:
    run(api, "install")
    job(api)["spec"]["template"]["spec"]["subdomain"] = "another"
    with pytest.raises(AssertionError, match="field is immutable"):
        run(api, "upgrade")
