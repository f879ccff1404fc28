"""`tandem gpus`: assigns GPUs to the services of the compose stack, in files that `docker compose up` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tandem_protocol.config import ConfigError, load
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.config.trl import THE_SCRIPTS, ScriptSettings
from tandem_protocol.device_sets import CDI_KIND, check_disjoint, parse_devices, repeated_devices
from tandem_protocol.script import SETTINGS_FILE

from .checkout import COMPOSE_FILES
from .gpu_inventory import Driver, Host, look_for_gpus

OVERRIDE = """\
# Written by `tandem gpus`. Do not edit: the next call overwrites it.
services:
  preflight:
    environment: {preflight}
  generator:
    environment: {generator}
    deploy: {{resources: {{reservations: {{devices: !override [{generator_devices}]}}}}}}
  trainer:
    environment: {trainer}
    deploy: {{resources: {{reservations: {{devices: !override [{trainer_devices}]}}}}}}
"""


class Layout(NamedTuple):
    """The devices of each service, and how the generator divides the model among its own."""

    driver: Driver
    generator: tuple[str, ...]
    """Device names that the driver accepts; `trainer` likewise."""
    trainer: tuple[str, ...]
    tensor_parallel: int
    """Number of GPUs that share one copy of the model."""

    def override(self) -> str:
        """Return the compose file that assigns the devices."""
        processes = str(len(self.trainer))
        return OVERRIDE.format(
            preflight=json.dumps(
                {
                    "TANDEM_GENERATOR_GPUS": ",".join(self.generator),
                    "TANDEM_TRAINER_GPUS": ",".join(self.trainer),
                    "TANDEM_TRAINER_PROCESSES": processes,
                }
            ),
            generator=json.dumps(
                {
                    "TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE": str(self.tensor_parallel),
                    "TANDEM__GENERATOR__DATA_PARALLEL_SIZE": str(len(self.generator) // self.tensor_parallel),
                }
            ),
            trainer=json.dumps({"TANDEM_TRAINER_PROCESSES": processes}),
            generator_devices=self._reservation(self.generator),
            trainer_devices=self._reservation(self.trainer),
        )

    def _reservation(self, devices: Sequence[str]) -> str:
        return json.dumps({"driver": self.driver, "device_ids": devices, "capabilities": ["gpu"]})


def gpus(
    generator: str, trainer: str, *, driver: Driver, tensor_parallel: int | None, project: Path | None, folder: Path
) -> list[str]:
    """Check the sets of devices, then write compose.devices.yaml and .env in `folder`.

    Args:
        generator: the generator's devices, such as `0-3`; `trainer` likewise.
        tensor_parallel: number of GPUs that share one copy of the model. None: all GPUs of the generator. If there is
            more than one copy, the copies are served data-parallel.
        project: the project that the stack will run, or the folder of a TRL script. None: TANDEM_PROJECT, or the
            stack's default.
        folder: the folder of Tandem's compose.yaml.

    Returns:
        Notes for the user, such as checks that could not be made.

    Raises:
        ConfigError: the devices cannot be used like this (then nothing was written), or a file cannot be written.
    """
    generator_devices = _driver_names("--generator", generator, driver)
    trainer_devices = _driver_names("--trainer", trainer, driver)
    host = look_for_gpus(driver)
    for option, devices in (("--generator", generator_devices), ("--trainer", trainer_devices)):
        _check_exist(option, devices, host.names, driver)
        _check_once(option, devices, host.uuids)
    fix = "move them out of --generator or out of --trainer"
    check_disjoint(generator_devices, trainer_devices, kind="GPUs", uuids=host.uuids, fix=fix)
    env_file = folder / ".env"
    env_text = env_file.read_text() if env_file.is_file() else ""
    layout = Layout(driver, generator_devices, trainer_devices, tensor_parallel=len(generator_devices))
    if tensor_parallel is not None:
        layout = layout._replace(tensor_parallel=tensor_parallel)
    named = _project_folder(project, env_text, folder)
    settings = _read_settings(named)
    if isinstance(settings, TrainerSettings):  # a TRL script divides its batch itself
        _check_processes(len(trainer_devices), settings.trainer.rollout.num_prompts)
    notes = [
        *host.notes,
        *_not_compared((*generator_devices, *trainer_devices), host),
        *_check_split(layout, named, settings.shared.model),
    ]
    try:
        _write(folder / COMPOSE_FILES[2], layout.override())
        _write(env_file, _with(env_text, _variables(env_text, project, folder)))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error}") from error
    if "COMPOSE_FILE" in os.environ:
        notes.append("COMPOSE_FILE is set in this shell and takes precedence over .env. Fix: unset COMPOSE_FILE")
    return notes


def _write(file: Path, text: str) -> None:
    """Write a file. One that root creates, for example in a container, belongs to the owner of its folder."""
    is_new = not file.exists()
    file.write_text(text)
    if is_new and os.geteuid() == 0:
        owner = file.parent.stat()
        os.chown(file, owner.st_uid, owner.st_gid)


def _driver_names(option: str, text: str, driver: Driver) -> tuple[str, ...]:
    """Parse a set of devices to names that the driver accepts.

    Raises:
        ConfigError: the set is empty, or has a name that only the other driver accepts.
    """
    devices = parse_devices(text)
    if not devices:
        raise ConfigError(f"{option}: got no device, expected one or more, such as 0-3")
    if driver == "cdi":
        return tuple(device if "=" in device else f"{CDI_KIND}{device}" for device in devices)
    if cdi := [device for device in devices if "=" in device]:
        raise ConfigError(
            f"{option}: got the CDI name {cdi[0]} with the driver nvidia, expected an index or a UUID. Fix: use "
            "--driver cdi"
        )
    return devices


def _check_exist(option: str, devices: Sequence[str], known: frozenset[str], driver: Driver) -> None:
    if known and (unknown := [device for device in devices if device not in known]):
        command = "nvidia-smi -L" if driver == "nvidia" else "nvidia-ctk cdi list"
        raise ConfigError(
            f"{option}: got {', '.join(unknown)}, expected devices from this list: {', '.join(sorted(known))} "
            f"(from `{command}`)"
        )


def _check_once(option: str, devices: Sequence[str], uuids: Mapping[str, str]) -> None:
    if repeated := repeated_devices(devices, uuids):
        raise ConfigError(
            f"{option}: got {', '.join(repeated)}, which the list {', '.join(devices)} has already named, expected "
            "each GPU once. Fix: remove it"
        )


def _not_compared(devices: Sequence[str], host: Host) -> list[str]:
    """Return a note if two names may mean one GPU, and nvidia-smi is not there to tell."""
    kinds = {device.removeprefix(CDI_KIND).isdecimal() for device in devices}
    if host.uuids or len(kinds) < 2:
        return []
    return ["without nvidia-smi, it was not checked whether an index and another name mean one GPU"]


def _check_processes(processes: int, num_prompts: int) -> None:
    """Check that the trainer's processes, one per GPU, get the same number of prompts.

    Raises:
        ConfigError: they do not.
    """
    if num_prompts % processes == 0:
        return
    fitting = [str(n) for n in range(1, min(num_prompts, 2 * processes) + 1) if num_prompts % n == 0]
    raise ConfigError(
        f"--trainer: got {processes} GPUs, which start {processes} processes, for the {num_prompts} prompts of "
        f"trainer.rollout.num_prompts, expected a number of GPUs that divides {num_prompts}. Fix: name "
        f"{' or '.join(fitting)} GPUs, or set num_prompts to a multiple of {processes} in config.yaml"
    )


def _check_split(layout: Layout, project: Path, model: str) -> list[str]:
    """Check that the generator can divide the model among its devices, and return what could not be checked.

    Raises:
        ConfigError: it cannot.
    """
    devices = len(layout.generator)
    size = layout.tensor_parallel
    if size < 1 or devices % size:
        raise ConfigError(
            f"--tensor-parallel: got {size} for {devices} devices of the generator, expected a divisor of {devices}"
        )
    heads = _attention_heads(project / model / "config.json")
    if heads is None:
        known_as = "the script's model" if model == THE_SCRIPTS["shared.model"] else model
        return [
            f"the number of attention heads of {known_as} is not known here, so it was not checked whether the "
            f"tensor-parallel size {size} divides it"
        ]
    if heads % size:
        fitting = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
        raise ConfigError(
            f"got tensor-parallel size {size} for {model}, which has {heads} attention heads, expected a divisor of "
            f"{heads}. Fix: --tensor-parallel {' or '.join(map(str, fitting))}, or another number of devices for "
            "--generator"
        )
    return []


def _attention_heads(file: Path) -> int | None:
    """Return the number of attention heads in a model's config.json; None if the model is not there."""
    try:
        described = json.loads(file.read_text())
    except OSError:
        return None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    heads: int | None = (described.get("text_config") or described).get("num_attention_heads")
    return heads


def _read_settings(project: Path) -> TrainerSettings | ScriptSettings:
    """Read the settings of a project, or of a folder with a TRL script, which needs none.

    Raises:
        ConfigError: the folder is neither, or a setting is not valid.
    """
    config = project / "config.yaml"
    if config.is_file():
        return load(TrainerSettings, path=config, env={})[0]
    if not any(project.glob("*.py")):
        raise ConfigError(
            f"{config} does not exist, expected a project: a folder with config.yaml in it, or one with a TRL script. "
            "Fix: name it with --project DIR"
        )
    settings = project / SETTINGS_FILE
    return load(ScriptSettings, path=settings if settings.is_file() else None, env={}, defaults=THE_SCRIPTS)[0]


def _project_folder(project: Path | None, env_text: str, folder: Path) -> Path:
    configured = os.environ.get("TANDEM_PROJECT") or _values(env_text).get("TANDEM_PROJECT") or "examples/digits"
    return project or folder / configured


def _variables(env_text: str, project: Path | None, folder: Path) -> dict[str, str]:
    """Return the variables to set in .env: Tandem's compose files first, then those of the user."""
    automatic = [name for name in ("compose.override.yaml",) if (folder / name).is_file()]
    configured = _values(env_text).get("COMPOSE_FILE")
    # Once COMPOSE_FILE is set, compose no longer reads compose.override.yaml by itself.
    users_files = configured.split(":") if configured else automatic
    variables = {"COMPOSE_FILE": ":".join(dict.fromkeys([*COMPOSE_FILES, *users_files]))}
    if project:
        variables["TANDEM_PROJECT"] = str(project.resolve())
    return variables


def _values(env_text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in env_text.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def _with(env_text: str, values: Mapping[str, str]) -> str:
    """Return the text of .env with `values` set and every other line kept."""
    kept = [line for line in env_text.splitlines() if line.partition("=")[0].strip() not in values]
    return "".join(f"{line}\n" for line in [*kept, *(f"{name}={value}" for name, value in values.items())])
