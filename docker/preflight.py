"""Prepares the project before the services start. Runs at every `docker compose up` and in every trainer pod.

It copies the project to a volume, since the project is mounted read-only and prepare.py writes files into its folder.
It finds mistakes in the configuration, and downloads the model from the hub, since the services have no network to the
outside. Compose starts it as root: files that transformers saved can only be read by their owner. After copying it
becomes the services' user. Kubernetes starts it as that user.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from commands import CommandFailed, run_shown
from hub import Unreachable, download_model, is_cached, retried
from project_checks import check_inputs, check_model, check_settings
from project_files import identify, refresh
from project_lock import claim, is_in_use
from script_checks import CONFIG, prepare_script

from tandem_protocol import logs
from tandem_protocol.config import (
    ENVIRONMENT_TOKEN_FILE_ENV,
    TOKEN_FILE_ENV,
    ConfigError,
    SharedConfig,
    SharedSettings,
    load,
)
from tandem_protocol.device_sets import check_disjoint, parse_devices, shares_all
from tandem_protocol.folders import TEMPORARY
from tandem_protocol.handover import PREFLIGHT_FILE, Failure, hand_over
from tandem_protocol.problems import first_few
from tandem_protocol.requirements import missing, requirements_file
from tandem_protocol.script import script_command

log = logging.getLogger("tandem_preflight")

SOURCES = [Path(path) for path in os.environ.get("TANDEM_PROJECT_SOURCES", "/source").split(":")]
"""Folders of the project. A file in a later folder replaces that of an earlier one."""
PROJECT = Path(os.environ.get("TANDEM_PROJECT_DIR", "/project"))
HUB_TOKEN = Path("/hf_token")
NOT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""The files of a model that its tokenizer needs."""
FIXES = {
    "CPUs": "set TANDEM_GENERATOR_CPUS and TANDEM_TRAINER_CPUS",
    "GPUs": "run `tandem gpus`, or set TANDEM_GENERATOR_GPU and TANDEM_TRAINER_GPU for one each",
}
"""What the user can do if the services' sets overlap."""


def main() -> int:
    """Prepare the project.

    Under Compose, the trainer reports a failure: Compose shows neither this log nor this exit status. If the services
    are already running, their trainer does not read it. Then Compose shows the exit status.

    Returns:
        0 if the services may start, 2 for an error that a retry would not change, 1 for another one, or the exit status
        of prepare.py. If the failure was handed to the trainer, 0.
    """
    try:
        logs.configure()
        log.setLevel(logging.INFO)
        identity = os.environ.get("TANDEM_PROJECT_IDENTITY") or "+".join(map(identify, SOURCES))
        if not claim(PROJECT, SOURCES, identity):
            log.info("the services are running with exactly this project, so there is nothing to prepare")
            return 0
    except (ValueError, OSError) as error:
        if is_in_use():  # the trainer that is running does not read a failure
            logs.report_error(error)
            return 2
        return fail(Failure(2, str(error)))
    try:
        forget_failure()
        prepare(identity)
    except CommandFailed as error:
        return fail(Failure(error.status, str(error)))
    except (Unreachable, OSError) as error:
        return fail(Failure(1, str(error)))
    except ValueError as error:  # ConfigError, and one of a library that reads the project's files
        return fail(Failure(2, str(error)))
    return 0


def prepare(identity: str) -> None:
    """Copy the project, check it, run its prepare.py, and download the model.

    Args:
        identity: a name of the project's folder on the host.

    Raises:
        ConfigError: a mistake in the project or in the configuration.
        CommandFailed: prepare.py or a check of the project failed.
        Unreachable, OSError: something failed that may work later.
    """
    check_devices(os.environ)
    if HUB_TOKEN.exists() and (token := HUB_TOKEN.read_text().strip()):
        os.environ["HF_TOKEN"] = token  # read while still root: the file may belong to another user
    retried(
        partial(copy_project, identity),
        "copying the project",
        lambda error: getattr(error, "errno", None) not in TEMPORARY,
    )
    if os.geteuid() == 0:
        become_owner_of(PROJECT)
    for variable in (TOKEN_FILE_ENV, ENVIRONMENT_TOKEN_FILE_ENV):
        if file := os.environ.get(variable):
            make_token(Path(file))
    check_requirements()
    if script := script_command():
        prepare_script(PROJECT, script)
        config = PROJECT / CONFIG
    else:
        config = PROJECT / "config.yaml"
        prepare_project(config)
    settings, _ = load(SharedSettings, path=config)
    if not check_model(PROJECT, settings.shared):
        fetch_model(settings.shared, check=not script)


def prepare_project(config: Path) -> None:
    """Check a project's settings, and run its prepare.py.

    Raises:
        ConfigError: a mistake in the configuration.
        CommandFailed: prepare.py failed.
    """
    check_settings(config)
    if (PROJECT / "prepare.py").exists():
        log.info("preparing the project with its prepare.py")
        run_shown("prepare.py", [sys.executable, "prepare.py"], PROJECT)
        check_settings(config)  # prepare.py may have changed it


def forget_failure() -> None:
    """Delete the failure of an earlier start."""
    if file := os.environ.get(PREFLIGHT_FILE):
        Path(file).unlink(missing_ok=True)


def fail(failure: Failure) -> int:
    """Report a failure. Returns the exit status: 0 if the trainer will report it."""
    logs.report_error(failure.message)
    file = os.environ.get(PREFLIGHT_FILE)
    if not file:
        return failure.status
    try:
        hand_over(Path(file), failure)
    except OSError as error:
        log.warning("the trainer cannot be informed: %s", error)
        return failure.status
    return 0


def check_devices(env: Mapping[str, str]) -> None:
    """Refuse GPUs that overlap, and CPU sets that do but are not equal. A set that is not configured is not checked.

    Raises:
        ConfigError: the sets overlap, or are not lists of devices.
    """
    for kind, fix in FIXES.items():
        generator, trainer = (
            parse_devices(env.get(f"TANDEM_{service}_{kind.upper()}", "")) for service in ("GENERATOR", "TRAINER")
        )
        if kind == "CPUs" and shares_all(generator, trainer):
            continue
        check_disjoint(generator, trainer, kind=kind, fix=fix)


def make_token(path: Path) -> None:
    """Create a bearer token, unless it exists. Only the services' user and its group, for Prometheus, can read it."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_urlsafe(32))
        temporary.replace(path)
    path.chmod(0o640)


def check_requirements() -> None:
    """Check that this image has the packages that the project needs.

    Raises:
        ConfigError: it does not.
        OSError: a requirements file cannot be read.
    """
    if (file := requirements_file(PROJECT)) and (problems := missing(file)):
        raise ConfigError(
            f"got an image without {first_few(problems)}, expected the packages of {file.name}. Fix: build the image "
            "again: `docker compose up --build`, or for Kubernetes as in docs/deploy/kubernetes.md"
        )


def copy_project(identity: str) -> None:
    """Copy the project's files to the volume. Files that its own prepare.py has created there are kept.

    Raises:
        ConfigError: no source has a config.yaml.
    """
    if not script_command() and not any((source / "config.yaml").is_file() for source in SOURCES):
        raise ConfigError(
            "got a folder without config.yaml, expected a project. Fix: set TANDEM_PROJECT to a folder with config.yaml"
        )
    PROJECT.mkdir(exist_ok=True)
    owner = PROJECT.stat()
    if reason := refresh(PROJECT, SOURCES, identity):
        log.info("deleted the files on the project volume, because %s", reason)
    if os.geteuid() == 0:
        for path in [PROJECT, *PROJECT.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def become_owner_of(path: Path) -> None:
    """Become the user who owns `path`, and give up root permanently. The image sets the owner of its mount points."""
    owner = path.stat()
    os.setgroups([])
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)


def fetch_model(shared: SharedConfig, *, check: bool) -> None:
    """Download a model from the hub to the cache volume. The services read it there without a network.

    Args:
        check: Check the prompts and rewards before a long download. Otherwise the trainer checks them, while the
            generators start.

    Raises:
        ConfigError: the model is neither a directory of the project nor available on the hub.
        CommandFailed: the project's prompts or rewards are wrong.
        Unreachable: the hub cannot be reached.
    """
    if check and not is_cached(shared.model, shared.revision):
        log.info("downloading %s", shared.model)
        download_model(shared.model, shared.revision, NOT_WEIGHTS)
        check_inputs(PROJECT)
    download_model(shared.model, shared.revision)


if __name__ == "__main__":
    sys.exit(main())
