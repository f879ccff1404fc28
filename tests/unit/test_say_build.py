"""`make up` says what building the images costs, and only if they are missing. A fake `docker` answers here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.stack import ROOT

FAKE = """#!/bin/bash
case $* in
    "compose config --images") printf '%s\\n' {images} ;;
    "image inspect "*) [[ " {built} " == *" $3 "* ]] ;;
    *) exit 9 ;;
esac
"""


@pytest.mark.parametrize(
    ("images", "built", "words"),
    [
        ("trainer:cpu trainer:cpu generator:cpu", "trainer:cpu generator:cpu", []),
        ("trainer:cpu trainer:cpu generator:cpu", "trainer:cpu", ["Building generator:cpu.", "5 GB of disk"]),
        ("trainer:cpu generator:mock", "", ["Building generator:mock trainer:cpu.", "minutes", "download 0.9 GB"]),
        ("trainer:cuda generator:cuda", "", ["Building generator:cuda trainer:cuda.", "Nobody has measured"]),
    ],
)
def test_only_images_that_are_missing_are_announced(tmp_path: Path, images: str, built: str, words: list[str]) -> None:
    program = tmp_path / "docker"
    program.write_text(FAKE.format(images=images, built=built))
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([ROOT / "scripts/say_build"], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert [word for word in words if word not in done.stdout] == []
    assert bool(done.stdout) == bool(words)


def test_the_figures_are_those_of_the_page() -> None:
    page = (ROOT / "docs/deploy/containers.md").read_text()
    script = (ROOT / "scripts/say_build").read_text()
    for figure in ("5 minutes", "0.9 GB", "5 GB of disk"):
        assert figure in page, figure
        assert figure in script, figure
