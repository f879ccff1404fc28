"""The images for the CPU share their largest layer."""

from __future__ import annotations

import re

import pytest

from support.stack import ROOT

LOCKS = ROOT / "docker/requirements"


def stage(dockerfile: str, name: str) -> str:
    """Return the text of a build stage, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / f"docker/{dockerfile}.Dockerfile").read_text(), flags=re.MULTILINE)
    (found,) = re.findall(rf"^FROM \S+ AS {name}\n.*?(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found).strip()


def pins(lock: str) -> set[str]:
    """Return the entries of a lock: a version and its hashes."""
    return set(re.findall(r"^\S+==(?:.*\\\n)*.*$", (LOCKS / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["build", "shared-cpu", "base"])
def test_the_stages_of_the_shared_layer_are_the_same_in_both_dockerfiles(name: str) -> None:
    assert stage("generator", name) == stage("trainer", name)


@pytest.mark.parametrize(("dockerfile", "image"), [("generator", "cpu"), ("trainer", "trainer-cpu")])
def test_the_shared_packages_are_the_first_layer_on_the_base(dockerfile: str, image: str) -> None:
    assert stage(dockerfile, "runtime").startswith("FROM base")
    assert re.search(r"^(RUN|COPY|ADD)", stage(dockerfile, "runtime"), re.MULTILINE) is None
    assert stage(dockerfile, image).splitlines()[1] == "COPY --from=shared-cpu /opt/tandem /opt/tandem"


def test_the_packages_of_a_project_are_the_last_layer() -> None:
    assert stage("trainer", "cpu").startswith(
        "FROM trainer-cpu AS cpu\nCOPY --from=packages-cpu /opt/project /opt/tandem"
    )


@pytest.mark.parametrize("lock", ["generator-cpu.txt", "trainer-cpu.txt"])
def test_the_shared_packages_have_the_versions_of_both_services(lock: str) -> None:
    assert pins("shared-cpu.txt") <= pins(lock)
    assert any(pin.startswith("torch==") for pin in pins("shared-cpu.txt"))
