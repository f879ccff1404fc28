"""Objects of different releases have different names, whatever the length of the release's name."""

from __future__ import annotations

from typing import Any

import pytest

from support.chart_rules import violations
from support.helm import names, of_kind, one, render

pytestmark = pytest.mark.helm

LONG = "a-release-with-a-name-as-long-as-helm-allows-it-to-b"
LIMIT = 30


def prefix(release: str, values: dict[str, Any] | None = None) -> str:
    """Return the prefix of a release's objects: the name of its ServiceAccount."""
    return str(one(render(values, release=release), "ServiceAccount")["metadata"]["name"])


def test_names_that_fit_are_used_as_they_are() -> None:
    assert prefix("mine") == "mine-tandem"
    assert prefix("my-tandem") == "my-tandem"
    assert prefix("x" * (LIMIT - len("-tandem"))) == "x" * (LIMIT - len("-tandem")) + "-tandem"
    assert prefix("mine", {"fullnameOverride": "other"}) == "other"


def test_two_long_releases_share_no_object() -> None:
    for one_name, other in (
        (f"{LONG}a", f"{LONG}b"),
        (LONG, LONG[:-2]),
        (LONG[:40], LONG[:24]),
        ("a.b", "a-b"),
        ("1a", "r1a"),
    ):
        mine, theirs = (names(render(release=release, upgrade=True)) for release in (one_name, other))
        assert mine & theirs == set()


def test_two_long_overrides_share_no_object() -> None:
    overrides = [{"fullnameOverride": f"{'y' * 40}{end}"} for end in "ab"]
    assert prefix("run", overrides[0]) != prefix("run", overrides[1])
    named = [{"nameOverride": f"{'y' * 40}{end}"} for end in "ab"]
    assert prefix("run", named[0]) != prefix("run", named[1])


@pytest.mark.parametrize("release", ["007", "true", "1e5", "a.b", "0.1"])
def test_every_name_that_helm_allows_makes_valid_objects(release: str) -> None:
    assert violations(render(release=release, upgrade=True)) == []
    (service,) = of_kind(render(release=release), "Service")
    assert service["spec"]["selector"]["app.kubernetes.io/instance"] == release


@pytest.mark.parametrize("release", [LONG, "x" * 53, f"{'x' * 20}-{'y' * 20}", f"{'x' * 20}--{'y' * 20}"])
def test_a_cut_name_is_a_short_dns_label_and_the_same_every_time(release: str) -> None:
    made = prefix(release)
    assert len(made) <= LIMIT
    assert made[0].isalpha()
    assert made[-1].isalnum()
    assert prefix(release, {"offline": False}) == made
