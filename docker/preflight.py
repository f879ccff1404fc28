"""Prepares the project before the services start. Runs at every `docker compose up` and in every trainer pod.

It copies the project to a volume, since the project is mounted read-only and prepare.py writes files into its folder.
It downloads the model from the hub, since the services have no network to the outside.
Compose starts it as root: files that transformers saved can only be read by their owner. After copying it becomes the
services' user. Kubernetes starts it as that user.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from project_files import identify, refresh
from project_lock import claim
from pydantic import BaseModel

from tandem_protocol.config import TOKEN_FILE_ENV, ConfigError, SharedConfig, load
from tandem_protocol.device_sets import check_disjoint, parse_devices
from tandem_protocol.requirements import missing, requirements_file, summarize

SOURCES = [Path(path) for path in os.environ.get("TANDEM_PROJECT_SOURCES", "/source").split(":")]
"""Folders of the project. A file in a later folder replaces that of an earlier one."""
PROJECT = Path(os.environ.get("TANDEM_PROJECT_DIR", "/project"))
HUB_TOKEN = Path("/hf_token")
FIXES = {
    "CPUs": "set TANDEM_GENERATOR_CPUS and TANDEM_TRAINER_CPUS",
    "GPUs": "run `tandem gpus`, or set TANDEM_GENERATOR_GPU and TANDEM_TRAINER_GPU for one each",
}
"""What the user can do if the services' sets overlap."""


class Settings(BaseModel, extra="ignore"):
    """The section of the configuration that the preflight reads. The services check the rest."""

    shared: SharedConfig


def main() -> int:
    """Prepare the project.

    Returns:
        The exit code: 0 if the services may start, 2 for an error of the user, else the exit code of prepare.py.
    """
    try:
        check_devices(os.environ)
        if HUB_TOKEN.exists() and (token := HUB_TOKEN.read_text().strip()):
            os.environ["HF_TOKEN"] = token  # read while still root: the file may belong to another user
        identity = os.environ.get("TANDEM_PROJECT_IDENTITY") or "+".join(map(identify, SOURCES))
        if not claim(PROJECT, SOURCES, identity):
            say("the services are running with exactly this project, so there is nothing to prepare")
            return 0
        copy_project(identity)
        if os.geteuid() == 0:
            become_owner_of(PROJECT)
        if file := os.environ.get(TOKEN_FILE_ENV):
            make_token(Path(file))
        check_requirements()
        if (PROJECT / "prepare.py").exists():
            say("preparing the project with its prepare.py")
            subprocess.run([sys.executable, "prepare.py"], cwd=PROJECT, check=True)
        settings, _ = load(Settings, path=PROJECT / "config.yaml")
        fetch_model(settings.shared)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        status = error.returncode if error.returncode >= 0 else 128 - error.returncode
        print(f"error: prepare.py ended with exit code {status}; see its output above", file=sys.stderr)
        return status
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def check_devices(env: Mapping[str, str]) -> None:
    """Refuse CPU sets or GPUs that overlap. A set that is not configured is not checked.

    Raises:
        ConfigError: the sets overlap, or are not lists of devices.
    """
    for kind, fix in FIXES.items():
        generator, trainer = (
            parse_devices(env.get(f"TANDEM_{service}_{kind.upper()}", "")) for service in ("GENERATOR", "TRAINER")
        )
        check_disjoint(generator, trainer, kind=kind, fix=fix)


def make_token(path: Path) -> None:
    """Create the bearer token, unless it exists. Only the services' user can read it."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_urlsafe(32))
        temporary.replace(path)


def check_requirements() -> None:
    """Check that this image has the packages that the project needs.

    Raises:
        ConfigError: it does not.
        OSError: a requirements file cannot be read.
    """
    if (file := requirements_file(PROJECT)) and (problems := missing(file)):
        raise ConfigError(
            f"got an image without {summarize(problems)}, expected the packages of {file.name}. Fix: build the image "
            "again: `docker compose up --build`, or for Kubernetes as in docs/deploy/kubernetes.md"
        )


def copy_project(identity: str) -> None:
    """Copy the project's files to the volume. Files that its own prepare.py has created there are kept.

    Raises:
        ConfigError: no source has a config.yaml.
    """
    if not any((source / "config.yaml").is_file() for source in SOURCES):
        raise ConfigError(
            "got a folder without config.yaml, expected a project. Fix: set TANDEM_PROJECT to a folder with config.yaml"
        )
    PROJECT.mkdir(exist_ok=True)
    owner = PROJECT.stat()
    if reason := refresh(PROJECT, SOURCES, identity):
        say(f"deleted the files on the project volume, because {reason}")
    if os.geteuid() == 0:
        for path in [PROJECT, *PROJECT.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def become_owner_of(path: Path) -> None:
    """Become the user who owns `path`, and give up root permanently. The image sets the owner of its mount points."""
    owner = path.stat()
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)


def fetch_model(shared: SharedConfig) -> None:
    """Download a model from the hub to the cache volume. The services read it there without a network.

    Raises:
        ConfigError: the model is neither a directory of the project nor available on the hub.
    """
    if (PROJECT / shared.model).is_dir():
        return
    say(f"downloading {shared.model}")
    try:
        snapshot_download(shared.model, revision=shared.revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"shared.model: got {shared.model!r}, expected a directory of the project or a model id of the hub, which "
            f"answers: {error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
