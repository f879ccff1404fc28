"""Which packages of a project's requirements file are not installed."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tandem_cli.project import Project
from tandem_protocol.config import ConfigError
from tandem_protocol.problems import first_few
from tandem_protocol.requirements import has_hashes, missing, requirements_file

PYYAML = version("pyyaml")


def write(folder: Path, text: str, name: str = "requirements.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_each_requirement_that_is_not_met_is_named_with_what_is_installed(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "PyYAML>=5  # met\n"
        "pyyaml<2\n"
        "no-such-package[extra]==1.0 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n"
        "another @ https://example.com/another-1.whl\n"
        'not-here==1; python_version < "3"\n',
    )
    assert missing(file) == [
        f"pyyaml<2 (installed: {PYYAML})",
        "no-such-package[extra]==1.0 (not installed)",
        "another @ https://example.com/another-1.whl (not installed)",
    ]
    assert has_hashes(file)


def test_files_that_are_included_count_and_lines_that_only_pip_understands_do_not(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "\ufeff# a comment\n--index-url https://example.com\n-r more.txt\n-r https://example.com/r.txt\n"
        "-e .\n./local\ngit+https://example.com/x.git\n-c constraints.txt\n",
    )
    write(tmp_path, "-r requirements.txt\n--requirement=deeper.txt\nfirst\n", "more.txt")
    write(tmp_path, "second\n", "deeper.txt")
    assert missing(file) == ["second (not installed)", "first (not installed)"]
    assert not has_hashes(file)


def test_the_environment_may_name_another_file_which_must_exist(tmp_path: Path) -> None:
    assert requirements_file(tmp_path, {}) is None
    assert requirements_file(tmp_path, {"TANDEM_REQUIREMENTS": ""}) is None
    file = write(tmp_path, "", "packages.txt")
    assert requirements_file(tmp_path, {"TANDEM_REQUIREMENTS": "packages.txt"}) == file
    with pytest.raises(ConfigError, match=r"TANDEM_REQUIREMENTS=absent\.txt"):
        requirements_file(tmp_path, {"TANDEM_REQUIREMENTS": "absent.txt"})


def test_a_long_list_is_cut() -> None:
    assert first_few(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert first_few(["a"]) == "a"


def test_the_demo_says_what_to_install(tmp_path: Path) -> None:
    write(
        tmp_path,
        "shared: {model: m}\ngenerator: {}\ntrainer: {max_steps: 1, rewards: [{function: 'rewards:exact'}]}\n",
        "config.yaml",
    )
    project = Project.read(tmp_path, {})
    project.require_packages()
    file = write(tmp_path, "no-such-package==1.0\n")
    with pytest.raises(ConfigError, match=rf"without no-such-package==1\.0 \(not inst.*-m pip install -r {file}$"):
        project.require_packages()
    write(tmp_path, "no-such-package==1.0 --hash=sha256:00\n")
    with pytest.raises(ConfigError, match=rf"-m pip install --no-deps -r {file}$"):
        project.require_packages()
