"""Gets everything ready before the services start; runs again at every `docker compose up` and trainer pod.

The project is mounted read-only, and prepare.py writes beside itself: so the services see a copy on a volume.
Compose starts this as root, since a model that transformers saved is its owner's to read; all but copying is the
services' user's, as whom Kubernetes starts it. It is also the one to fetch a model from the hub, because the services
have no way outside.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel

from tandem_protocol.config import TOKEN_FILE_ENV, ConfigError, SharedConfig, load
from tandem_protocol.device_sets import check_disjoint, parse_devices

SOURCES = [Path(path) for path in os.environ.get("TANDEM_PROJECT_SOURCES", "/source").split(":")]
"""Later ones win."""
PROJECT = Path(os.environ.get("TANDEM_PROJECT_DIR", "/project"))
NOT_COPIED = ("runs", "weights", "__pycache__", ".*")
HUB_TOKEN = Path("/hf_token")
MENDS = {
    "CPUs": "set TANDEM_GENERATOR_CPUS and TANDEM_TRAINER_CPUS",
    "GPUs": "run `tandem gpus`, or set TANDEM_GENERATOR_GPU and TANDEM_TRAINER_GPU for one each",
}
"""What to do about sets that overlap."""


class Settings(BaseModel, extra="ignore"):
    """What is read of the configuration here; the services check the rest."""

    shared: SharedConfig


def main() -> int:
    """Exit code: 0 when the services may start, 2 for a mistake of the user, else what prepare.py ended with."""
    try:
        check_devices(os.environ)
        if HUB_TOKEN.exists() and (token := HUB_TOKEN.read_text().strip()):
            os.environ["HF_TOKEN"] = token  # only its owner, or root, can read the file
        copy_project()
        if os.geteuid() == 0:
            become_owner_of(PROJECT)
        if file := os.environ.get(TOKEN_FILE_ENV):
            make_token(Path(file))
        if (PROJECT / "prepare.py").exists():
            say("preparing the project with its prepare.py")
            subprocess.run([sys.executable, "prepare.py"], cwd=PROJECT, check=True)
        settings, _ = load(Settings, path=PROJECT / "config.yaml")
        fetch_model(settings.shared)
    except (ConfigError, OSError) as error:  # shutil.Error is an OSError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: prepare.py ended with {error.returncode}; what it printed is above", file=sys.stderr)
        return error.returncode
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def check_devices(env: Mapping[str, str]) -> None:
    """Refuse CPU sets or GPUs that overlap; a set that is not there is not checked.

    Raises:
        ConfigError: they do, or are no lists of devices.
    """
    for kind, fix in MENDS.items():
        generator, trainer = (
            parse_devices(env.get(f"TANDEM_{of}_{kind.upper()}", "")) for of in ("GENERATOR", "TRAINER")
        )
        check_disjoint(generator, trainer, kind=kind, fix=fix)


def make_token(path: Path) -> None:
    """Make the bearer token once; only the services' user can read it."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_urlsafe(32))
        temporary.replace(path)


def copy_project() -> None:
    """Copy the sources' files over those on the volume, where what prepare.py has made stays.

    Raises:
        ConfigError: there is no project.
    """
    if not any((source / "config.yaml").is_file() for source in SOURCES):
        raise ConfigError(
            "got a folder without config.yaml, expected TANDEM_PROJECT=<a project: a folder that has one>"
        )
    PROJECT.mkdir(exist_ok=True)
    owner = PROJECT.stat()
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    for source in SOURCES:
        shutil.copytree(source, PROJECT, ignore=ignore, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if os.geteuid() == 0:
        for path in [PROJECT, *PROJECT.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def become_owner_of(path: Path) -> None:
    """Give up root, for good, for the user whom the image has given its mount points to."""
    owner = path.stat()
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)


def fetch_model(shared: SharedConfig) -> None:
    """Put a model of the hub into the cache volume, from which the services read it without a network.

    Raises:
        ConfigError: it is neither a directory nor to be had from the hub.
    """
    if (PROJECT / shared.model).is_dir():
        return
    say(f"fetching {shared.model}")
    try:
        snapshot_download(shared.model, revision=shared.revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"shared.model: got {shared.model!r}, which is no directory of the project and not to be had from the hub: "
            f"{error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
