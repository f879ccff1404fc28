"""The project volume has what its source folder has now, plus what its own prepare.py has made."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODULE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "docker/project_files.py"))
refresh: Callable[..., str | None] = MODULE["refresh"]
identify: Callable[[Path], str] = MODULE["identify"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tmp_path / "project"


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        file = path / name.replace("__", "/").replace("_py", ".py").replace("_yaml", ".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def names(project: Path) -> set[str]:
    files = (path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file())
    return {name for name in files if name != MODULE["STATE"]}


def copy(project: Path, source: Path) -> str | None:
    return refresh(project, [source], identify(source))


def test_what_prepare_made_stays_as_long_as_its_project_does(project: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "a", config_yaml="1", prepare_py="p")
    assert copy(project, source) is None
    folder(project, model__weights="made")
    folder(source, config_yaml="2")
    assert copy(project, source) is None
    assert names(project) == {"config.yaml", "prepare.py", "model/weights"}
    assert (project / "config.yaml").read_text() == "2"


def test_another_project_sees_nothing_of_the_one_before(project: Path, tmp_path: Path) -> None:
    copy(project, folder(tmp_path / "digits", config_yaml="1", prepare_py="p", prompts="many"))
    folder(project, model__weights="made")
    assert copy(project, folder(tmp_path / "mine", config_yaml="2")) == "the volume held another project"
    assert names(project) == {"config.yaml"}


def test_another_folder_at_the_same_path_is_another_project(project: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "a", config_yaml="1", old="1")
    copy(project, source)
    source.rename(tmp_path / "gone")
    copy(project, folder(tmp_path / "a", config_yaml="1"))
    assert names(project) == {"config.yaml"}


def test_files_that_the_source_lost_are_deleted(project: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "a", config_yaml="1", data__deep__old="1", data__kept="1", becomes_folder="1")
    copy(project, source)
    folder(project, data__made="by prepare")
    (source / "data/deep/old").unlink()
    (source / "data/deep").rmdir()
    (source / "becomes_folder").unlink()
    folder(source, becomes_folder__file="1")
    copy(project, source)
    assert names(project) == {"config.yaml", "data/kept", "data/made", "becomes_folder/file"}
    assert not (project / "data/deep").exists()


@pytest.mark.parametrize("after", ["other", None])
def test_what_another_prepare_made_goes(project: Path, tmp_path: Path, after: str | None) -> None:
    source = folder(tmp_path / "a", config_yaml="1", prepare_py="p")
    copy(project, source)
    folder(project, model__weights="made")
    (source / "prepare.py").write_text(after) if after else (source / "prepare.py").unlink()
    assert copy(project, source) == "prepare.py has changed"
    assert "model/weights" not in names(project)


def test_an_interrupted_copy_keeps_what_prepare_made(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "a", config_yaml="1", prepare_py="p", old="1")
    copy(project, source)
    folder(project, model__weights="made")
    folder(source, another="1")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space"):
        copy(project, source)
    monkeypatch.undo()
    (source / "old").unlink()
    (source / "another").unlink()
    assert copy(project, source) is None
    assert names(project) == {"config.yaml", "prepare.py", "model/weights"}


def test_files_of_an_unknown_project_are_deleted(project: Path, tmp_path: Path) -> None:
    folder(project, config_yaml="of an earlier release", model__weights="made")
    assert copy(project, folder(tmp_path / "a", config_yaml="1")) == "it is not known which project they belong to"
    assert names(project) == {"config.yaml"}


def test_a_link_that_prepare_made_is_replaced_and_not_followed(project: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "a", config_yaml="1", data__x="1", prepare_py="p")
    copy(project, source)
    elsewhere = folder(tmp_path / "elsewhere", file="precious", x="precious")
    (project / "config.yaml").unlink()
    (project / "config.yaml").symlink_to(elsewhere / "file")
    (project / "data/x").unlink()
    (project / "data").rmdir()
    (project / "data").symlink_to(elsewhere)
    copy(project, source)
    assert (elsewhere / "file").read_text() == (elsewhere / "x").read_text() == "precious"
    assert (project / "config.yaml").read_text() == (project / "data/x").read_text() == "1"


def test_links_are_copied_as_files_and_a_loop_ends(project: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "a", config_yaml="1", data__x="1")
    (source / "data/loop").symlink_to("..")
    (source / "shared").symlink_to(folder(tmp_path / "shared", y="1"))
    (source / "empty").mkdir()
    (source / "empty/.gitkeep").touch()
    (source / "run.sh").write_text("#!/bin/sh")
    (source / "run.sh").chmod(0o755)
    copy(project, source)
    assert {"config.yaml", "data/x", "shared/y", "run.sh"} == names(project)
    assert (project / "empty").is_dir()
    assert (project / "run.sh").stat().st_mode & 0o777 == 0o755


def test_later_sources_win_and_hidden_files_and_runs_are_left_out(project: Path, tmp_path: Path) -> None:
    first = folder(tmp_path / "a", config_yaml="1", runs__x="1", prompts="1")
    (first / ".git").mkdir()
    (first / ".git/config").write_text("secret")
    refresh(project, [first, folder(tmp_path / "b", config_yaml="2")], "chart")
    assert names(project) == {"config.yaml", "prompts"}
    assert (project / "config.yaml").read_text() == "2"
