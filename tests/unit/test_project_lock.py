"""The preflight does not replace a project that services use, and says what to do instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tandem_protocol.config import ConfigError
from tandem_protocol.lock import exclusive, project_in_use

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
from project_files import changes, identify, is_free_for, refresh
from project_lock import claim


class Volume:
    """A project's volume, and what the preflight does with it."""

    def __init__(self, folder: Path, held: ExitStack) -> None:
        self.folder = folder
        self.env = {"TANDEM_PROJECT_LOCK": str(folder / ".tandem-lock"), "COMPOSE_PROJECT_NAME": "mine"}
        self._held = held

    def claim(self, source: Path) -> bool:
        env = {**self.env, "TANDEM_PROJECT": source.name}
        return bool(claim(self.folder, [source], identify(source), env, self._held))

    def prepare(self, source: Path) -> bool:
        """Run a preflight until its end."""
        with self._held:
            if self.claim(source):
                refresh(self.folder, [source], identify(source))
                return True
            return False


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    (tmp_path / "volume").mkdir()
    with ExitStack() as held:
        yield Volume(tmp_path / "volume", held)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "first", "max_steps: 1")


def write(folder: Path, config: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    return folder


def test_another_project_is_refused_and_both_are_named(volume: Volume, source: Path) -> None:
    other = write(source.parent / "second", "max_steps: 2")
    assert volume.prepare(source)
    refused = pytest.raises(ConfigError, match=r"second, but the Compose project mine belongs to first\. .*OTHER up")
    with project_in_use(volume.env), refused:
        volume.prepare(other)
    with refused:
        volume.prepare(other)
    assert (volume.folder / "config.yaml").read_text() == "max_steps: 1"
    assert volume.prepare(source), "it can go on"


def test_a_new_folder_at_the_same_path_is_prepared(volume: Volume, source: Path) -> None:
    volume.prepare(source)
    source.rename(source.parent / "gone")
    assert volume.prepare(write(source, "max_steps: 3"))
    assert (volume.folder / "config.yaml").read_text() == "max_steps: 3"


@pytest.mark.parametrize(
    ("now", "free"),
    [
        ("/dev/vda:/srv/mine#7", True),
        ("/dev/vdb:/srv/mine#8", True),
        ("/dev/vda:/srv/other#7", False),
        ("server:/export:/srv/mine#7", True),
    ],
)
def test_the_path_says_which_project_it_is(volume: Volume, source: Path, now: str, free: bool) -> None:
    refresh(volume.folder, [source], "/dev/vda:/srv/mine#7")
    assert is_free_for(volume.folder, now) is free


def test_the_same_project_has_nothing_to_prepare_while_its_services_run(volume: Volume, source: Path) -> None:
    volume.prepare(source)
    with project_in_use(volume.env):
        write(source, "max_steps: 1")  # another time of change, the same content
        assert not volume.prepare(source)


@pytest.mark.parametrize("change", ["changed", "added", "deleted"])
def test_a_changed_file_is_reported_while_services_run(volume: Volume, source: Path, change: str) -> None:
    (source / "rewards.py").write_text("1")
    volume.prepare(source)
    {
        "changed": lambda: (source / "rewards.py").write_text("2"),
        "added": lambda: (source / "judge.py").touch(),
        "deleted": (source / "rewards.py").unlink,
    }[change]()
    name = "judge" if change == "added" else "rewards"
    with project_in_use(volume.env), pytest.raises(ConfigError, match=rf"changes in {name}\.py, but .* of mine"):
        volume.prepare(source)
    assert volume.prepare(source)


def test_files_that_prepare_made_or_rewrote_are_no_changes(volume: Volume, source: Path) -> None:
    volume.prepare(source)
    (volume.folder / "prompts.jsonl").touch()
    (volume.folder / "config.yaml").write_text("by prepare.py")
    assert changes(volume.folder, [source]) == []


def test_a_service_does_not_start_while_its_project_is_prepared(volume: Volume, source: Path) -> None:
    assert volume.claim(source)
    with pytest.raises(BlockingIOError, match="first is being prepared"), project_in_use(volume.env):
        pytest.fail("it started")


def test_only_one_preflight_is_at_work(volume: Volume, source: Path) -> None:
    with (
        exclusive(volume.folder / ".tandem-lock", "first"),
        pytest.raises(ConfigError, match="first is being prepared"),
    ):
        volume.claim(source)


def test_without_a_lock_in_the_environment_nothing_is_locked(volume: Volume, source: Path) -> None:
    volume.env.pop("TANDEM_PROJECT_LOCK")
    with project_in_use(volume.env):
        assert volume.prepare(source)
