"""`tandem gpus`: which GPUs each service of the compose stack gets, written so that `docker compose up` uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from tandem_protocol.config import ConfigError, load
from tandem_protocol.device_sets import CDI_KIND, check_disjoint, identity, parse_devices

from .gpu_inventory import Driver, look_for_gpus
from .project import SharedPart

COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml", "compose.devices.yaml")
"""In the order of merging; the last one is ours to write."""
OVERRIDE = """\
# Written by `tandem gpus`, which writes it again each time.
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


class Settings(BaseModel, extra="ignore"):
    """What is read of a project here."""

    shared: SharedPart


class Layout(NamedTuple):
    """Which devices each service gets, under names that the driver takes, and how the generator splits its own."""

    driver: Driver
    generator: tuple[str, ...]
    trainer: tuple[str, ...]
    tensor_parallel: int

    def override(self) -> str:
        """The compose file that gives them out."""
        return OVERRIDE.format(
            preflight=json.dumps(
                {"TANDEM_GENERATOR_GPUS": ",".join(self.generator), "TANDEM_TRAINER_GPUS": ",".join(self.trainer)}
            ),
            generator=json.dumps(
                {
                    "TANDEM__GENERATOR__TENSOR_PARALLEL_SIZE": str(self.tensor_parallel),
                    "TANDEM__GENERATOR__DATA_PARALLEL_SIZE": str(len(self.generator) // self.tensor_parallel),
                }
            ),
            trainer=json.dumps({"TANDEM_TRAINER_PROCESSES": str(len(self.trainer))}),
            generator_devices=self._reservation(self.generator),
            trainer_devices=self._reservation(self.trainer),
        )

    def _reservation(self, devices: Sequence[str]) -> str:
        return json.dumps({"driver": self.driver, "device_ids": devices, "capabilities": ["gpu"]})


def gpus(
    generator: str, trainer: str, *, driver: Driver, tensor_parallel: int | None, project: Path | None, folder: Path
) -> list[str]:
    """Check the sets, then write compose.devices.yaml and .env beside `folder`/compose.yaml.

    Args:
        generator: its devices as a person writes them; `trainer` likewise.
        tensor_parallel: how many GPUs share one copy of the model; None: all of the generator's. The copies are served
            data-parallel.
        project: becomes the stack's; None: what TANDEM_PROJECT says, or the stack's default.

    Returns:
        What the person should know: checks that could not be made.

    Raises:
        ConfigError: a set, or how the model is split over it, cannot work (then nothing was written), or a file cannot
            be written.
    """
    if missing := [name for name in COMPOSE_FILES[:2] if not (folder / name).is_file()]:
        raise ConfigError(f"{folder} has no {' and no '.join(missing)}, expected Tandem's own folder: --directory DIR")
    ours, theirs = _named("--generator", generator, driver), _named("--trainer", trainer, driver)
    host = look_for_gpus(driver)
    for option, devices in (("--generator", ours), ("--trainer", theirs)):
        _check_exist(option, devices, host.names, driver)
        if len({identity(device, host.uuids) for device in devices}) < len(devices):
            raise ConfigError(f"{option}: got one GPU twice in {', '.join(devices)}, expected each once")
    check_disjoint(ours, theirs, kind="GPUs", uuids=host.uuids, fix="move them out of --generator or out of --trainer")
    env_file = folder / ".env"
    before = env_file.read_text() if env_file.is_file() else ""
    layout = Layout(driver, ours, theirs, len(ours) if tensor_parallel is None else tensor_parallel)
    notes = [*host.notes, *_check_split(layout, _project_folder(project, before, folder))]
    try:
        (folder / COMPOSE_FILES[2]).write_text(layout.override())
        env_file.write_text(_with(before, _variables(before, project, folder)))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error}") from error
    if "COMPOSE_FILE" in os.environ:
        notes.append("this shell's COMPOSE_FILE goes before the one in .env; `unset COMPOSE_FILE`")
    return notes


def _named(option: str, text: str, driver: Driver) -> tuple[str, ...]:
    """The devices under names that the driver takes.

    Raises:
        ConfigError: there is none, or one that only the other driver takes.
    """
    devices = parse_devices(text)
    if not devices:
        raise ConfigError(f"{option}: got no device, expected one or more, such as 0-3")
    if driver == "cdi":
        return tuple(device if "=" in device else f"{CDI_KIND}{device}" for device in devices)
    if cdi := [device for device in devices if "=" in device]:
        raise ConfigError(f"{option}: got the CDI name {cdi[0]} for the driver nvidia, expected --driver cdi with it")
    return devices


def _check_exist(option: str, devices: Sequence[str], known: frozenset[str], driver: Driver) -> None:
    if known and (unknown := [device for device in devices if device not in known]):
        look = "nvidia-smi -L" if driver == "nvidia" else "nvidia-ctk cdi list"
        raise ConfigError(
            f"{option}: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}, which is all that "
            f"`{look}` lists"
        )


def _check_split(layout: Layout, project: Path) -> list[str]:
    """Whether the generator's devices can share the model; returns what could not be checked.

    Raises:
        ConfigError: they cannot.
    """
    devices, size = len(layout.generator), layout.tensor_parallel
    if size < 1 or devices % size:
        raise ConfigError(
            f"--tensor-parallel: got {size} for {devices} devices of the generator, expected a divisor of {devices}"
        )
    model, heads = _attention_heads(project)
    if heads is None:
        return [
            f"{model} does not tell here how many attention heads it has; whether {size} divides them was not checked"
        ]
    if heads % size:
        fitting = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
        raise ConfigError(
            f"got tensor-parallel size {size} for {model}, which has {heads} attention heads, expected a divisor of "
            f"them: --tensor-parallel {' or '.join(map(str, fitting))}, or another number of devices for --generator"
        )
    return []


def _attention_heads(project: Path) -> tuple[str, int | None]:
    """The project's model and, where its folder is at hand and tells, how many attention heads it has."""
    config = project / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{config} does not exist, expected --project DIR: a folder with config.yaml in it")
    model = load(Settings, path=config, env={})[0].shared.model
    try:
        described = json.loads((project / model / "config.json").read_text())
    except OSError:
        return model, None
    except ValueError as error:
        raise ConfigError(f"{project / model / 'config.json'} cannot be read: {error}") from error
    return model, (described.get("text_config") or described).get("num_attention_heads")


def _project_folder(project: Path | None, env_text: str, folder: Path) -> Path:
    named = os.environ.get("TANDEM_PROJECT") or _values(env_text).get("TANDEM_PROJECT") or "examples/digits"
    return project or folder / named


def _variables(env_text: str, project: Path | None, folder: Path) -> dict[str, str]:
    """What .env has to say: our compose files first, then the person's own."""
    automatic = [name for name in ("compose.override.yaml",) if (folder / name).is_file()]
    named = _values(env_text).get("COMPOSE_FILE")
    theirs = named.split(":") if named else automatic  # naming files ends what compose reads by itself
    files = {"COMPOSE_FILE": ":".join(dict.fromkeys([*COMPOSE_FILES, *theirs]))}
    return files | ({"TANDEM_PROJECT": str(project.resolve())} if project else {})


def _values(env_text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in env_text.splitlines() if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def _with(env_text: str, values: Mapping[str, str]) -> str:
    """The text with some variables set again and every other line kept."""
    kept = [line for line in env_text.splitlines() if line.partition("=")[0].strip() not in values]
    return "".join(f"{line}\n" for line in [*kept, *(f"{name}={value}" for name, value in values.items())])
