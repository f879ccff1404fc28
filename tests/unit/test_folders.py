"""A folder that cannot be used is reported with its key and the fix, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem_protocol.config import ConfigError
from tandem_protocol.folders import require_readable, require_writable

NOBODY = 65534
Check = Callable[[Path, str], None]


def test_a_folder_is_created_with_its_parents_and_stays_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "größe" / "b c", "trainer.output_dir")
    assert list((tmp_path / "größe" / "b c").iterdir()) == []
    require_readable(tmp_path / "größe", "shared.weights_dir")


def test_a_missing_folder_counts_as_readable(tmp_path: Path) -> None:
    require_readable(tmp_path / "absent", "shared.weights_dir")


@pytest.mark.parametrize("check", [require_readable, require_writable])
@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_on_the_path_is_reported(tmp_path: Path, path: str, check: Check) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^shared\.weights_dir: /.*file.* something on this path is a file\. Fix: "):
        check(tmp_path / path, "shared.weights_dir")


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not use. If the tests run as root, this one runs as another user."""
    tmp_path.chmod(0o000)
    if is_root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield tmp_path
    finally:
        if is_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("check", [require_readable, require_writable])
def test_missing_permissions_are_reported_with_the_user(nobody: Path, check: Check) -> None:
    with pytest.raises(ConfigError) as caught:
        check(nobody, "shared.weights_dir")
    assert str(caught.value).startswith(f"shared.weights_dir: {nobody} cannot be ")
    assert f"Permission denied, as user {os.geteuid()}. Fix: run `chown -R {os.geteuid()}:" in str(caught.value)


def test_a_folder_that_cannot_be_created_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.output_dir: /proc/absent/runs cannot be written to: No such file"):
        require_writable(Path("/proc/absent/runs"), "trainer.output_dir")
