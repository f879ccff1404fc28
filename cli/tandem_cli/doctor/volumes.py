"""Inspects the stack's volumes from short-lived containers: may the services' users use them, is the model there?"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

import docker
from docker.errors import DockerException, NotFound

from .docker_engine import PROJECT_LABEL
from .facts import GENERATOR, TRAINER, Access, ComposeService, Image, Model, Stack
from .model import NO_MODEL, parse_model
from .unknown import Refused, Unknown

TIMEOUT_S = 60
PREPARE = "run `docker compose up preflight`"
NO_VOLUMES = Unknown("the volumes do not exist yet", PREPARE)

WRITE = "import tempfile; tempfile.TemporaryFile(dir='/weights').write(b'x')"
READ = "import os; os.listdir('/weights')"
LOOK = """
import json, math, sys
from pathlib import Path
from tandem_protocol.fingerprint import checkpoint_shapes
name = sys.argv[1]
snapshots = f"hub/models--{name.replace('/', '--')}/snapshots/*"
for folder in (Path("/project", name), *Path("/cache").glob(snapshots)):
    if (folder / "config.json").is_file():
        parameters = sum(math.prod(shape) for shape in checkpoint_shapes(folder).values())
        config = json.loads((folder / "config.json").read_text())
        print(json.dumps({"folder": str(folder), "config": config, "parameters": parameters or None}))
        break
"""


@dataclass(frozen=True)
class VolumeProbe:
    """Runs short programs in containers with the images, users and volumes of the stack's services."""

    client: docker.DockerClient
    stack: Stack
    images: dict[str, Image]

    def find_model(self, name: str) -> Model | Unknown:
        """Look for the model on the project and the cache volume, as the trainer sees them."""
        printed = self._run(TRAINER, ("/project", "/cache"), LOOK, name)
        if isinstance(printed, Refused):
            return Refused(NO_MODEL, PREPARE, f"{name} on the project's volume: {printed.reason}")
        if isinstance(printed, Unknown):
            return printed
        if not printed:
            return Unknown(f"{name} is not on a volume yet", PREPARE)
        found = json.loads(printed)
        try:
            return parse_model(found["config"], found["parameters"], f"the volume at {found['folder']}")
        except ValueError as error:
            return Refused(NO_MODEL, PREPARE, f"{found['folder']} cannot be read: {error}")

    def try_weights(self) -> Access | Unknown:
        """Try whether the trainer can write the weight store and the generator can read it."""
        errors: list[str | None] = []
        for service, program in ((TRAINER, WRITE), (GENERATOR, READ)):
            done = self._run(service, ("/weights",), program)
            if isinstance(done, Unknown) and not isinstance(done, Refused):
                return done
            errors.append(done.reason if isinstance(done, Refused) else None)
        return Access(*errors)

    def pids(self) -> frozenset[int]:
        """Return the host's process ids of the stack's running containers."""
        own = {"label": f"{PROJECT_LABEL}={self.stack.name}"}
        try:
            running = self.client.containers.list(ignore_removed=True, filters=own)
            return frozenset(int(row[0]) for c in running for row in c.top(ps_args="-o pid")["Processes"])
        except DockerException:  # a container ended between the two calls
            return frozenset()

    def _run(self, name: str, targets: tuple[str, ...], program: str, *arguments: str) -> str | Unknown:
        """Return what `program` prints in a container of the service `name`; `Refused` with its last line if it fails.

        Args:
            targets: paths of the volumes to mount.
            program: Python code.
        """
        service = self.stack.services[name]
        mounts = self._mounts(service, targets)
        if name not in self.images:
            return Unknown(f"the {name}'s image does not exist yet", "run `docker compose build`")
        if len(mounts) < len(targets):
            return NO_VOLUMES
        try:
            container = self.client.containers.create(
                self.images[name].name,
                entrypoint=["python3", "-c", program],
                command=list(arguments),
                user=service.user or None,
                volumes=mounts,
                network_mode="none",
                read_only=True,
                cap_drop=["ALL"],
                labels={"tandem.doctor": name},
            )
        except DockerException as error:
            return Unknown(f"no container could be created from {self.images[name].name}: {error}")
        try:
            container.start()
            code = container.wait(timeout=TIMEOUT_S)["StatusCode"]
            output: str = container.logs().decode(errors="replace").strip()
        except (DockerException, OSError) as error:
            return Unknown(f"a container of {self.images[name].name} did not finish: {error}")
        finally:
            with suppress(DockerException):
                container.remove(force=True)
        if code:
            return Refused(output.splitlines()[-1] if output else f"exit code {code}")
        return output

    def _mounts(self, service: ComposeService, targets: tuple[str, ...]) -> list[str]:
        """Return the mounts at `targets` whose volumes exist.

        Mounting a volume that does not exist would create it, without compose's labels.
        """
        mounts = []
        for target in targets:
            mount = service.mount(target)
            source = self._source(mount.source) if mount else None
            if mount and source:
                mounts.append(f"{source}:{target}:{'ro' if mount.read_only else 'rw'}")
        return mounts

    def _source(self, key: str) -> str | None:
        """Return the engine's name of a volume, or None if it does not exist. A host folder is returned as it is."""
        if key.startswith("/"):
            return key
        volume = self.stack.volumes.get(key)
        try:
            return str(self.client.volumes.get(volume.name).name) if volume else None
        except NotFound:
            return None
