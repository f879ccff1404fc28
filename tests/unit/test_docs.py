"""What the documents show is what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_configuration_page_is_that_of_the_models() -> None:
    page = runpy.run_path(str(ROOT / "docs/reference/make_config.py"))["page"]()
    assert (ROOT / "docs/reference/config.md").read_text() == page, (
        "write it again: .venv/bin/python docs/reference/make_config.py"
    )


def test_the_page_of_model_families_is_that_of_what_was_measured() -> None:
    page = runpy.run_path(str(ROOT / "docs/reference/make_architectures.py"))["page"]()
    assert (ROOT / "docs/reference/architectures.md").read_text() == page, (
        "write it: .venv/bin/python docs/reference/make_architectures.py"
    )


def test_the_trainers_image_tells_the_cuda_version_of_its_lock() -> None:
    lock = (ROOT / "docker/requirements/trainer-cuda.txt").read_text()
    (told,) = re.findall(r"^ENV CUDA_VERSION=(.*)$", (ROOT / "docker/trainer.Dockerfile").read_text(), re.MULTILINE)
    assert f"\ncuda-toolkit=={told}." in lock


PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
