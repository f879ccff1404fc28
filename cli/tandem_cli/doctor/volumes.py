"""What the services' users can do on the stack's volumes, and the model that lies there: by short-lived containers."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

import docker
from docker.errors import DockerException, NotFound

from .engine import PROJECT_LABEL
from .facts import GENERATOR, TRAINER, Access, Image, Model, Service, Stack
from .model import NO_MODEL, parse_model
from .unknown import Refused, Unknown

TIMEOUT_S = 60
PREPARE = "docker compose up preflight"
NOT_YET = Unknown("the volumes are not there yet", PREPARE)

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
class Workshop:
    """Starts containers of the stack's images with the stack's volumes, as its services would."""

    client: docker.DockerClient
    stack: Stack
    images: dict[str, Image]

    def find_model(self, name: str) -> Model | Unknown:
        """The model on the project or the cache volume, as the trainer sees it."""
        printed = self._run(TRAINER, ("/project", "/cache"), LOOK, name)
        if isinstance(printed, Refused):
            return Refused(NO_MODEL, PREPARE, f"{name} on the project's volume: {printed.reason}")
        if isinstance(printed, Unknown):
            return printed
        if not printed:
            return Unknown(f"{name} is on no volume yet", PREPARE)
        found = json.loads(printed)
        try:
            return parse_model(found["config"], found["parameters"], f"the volume at {found['folder']}")
        except ValueError as error:
            return Refused(NO_MODEL, PREPARE, f"{found['folder']} cannot be read: {error}")

    def try_weights(self) -> Access | Unknown:
        """Whether the trainer can write the weight store and the generator read it."""
        errors: list[str | None] = []
        for service, program in ((TRAINER, WRITE), (GENERATOR, READ)):
            done = self._run(service, ("/weights",), program)
            if isinstance(done, Unknown) and not isinstance(done, Refused):
                return done
            errors.append(done.reason if isinstance(done, Refused) else None)
        return Access(*errors)

    def pids(self) -> frozenset[int]:
        """The processes of the stack's running containers, as the host numbers them."""
        own = {"label": f"{PROJECT_LABEL}={self.stack.name}"}
        try:
            running = self.client.containers.list(ignore_removed=True, filters=own)
            return frozenset(int(row[0]) for c in running for row in c.top(ps_args="-o pid")["Processes"])
        except DockerException:  # one of them ends just now
            return frozenset()

    def _run(self, name: str, targets: tuple[str, ...], program: str, *arguments: str) -> str | Unknown:
        """What `program` prints in a container of a service; `Refused` with its last line when it fails there."""
        service = self.stack.services[name]
        mounts = self._mounts(service, targets)
        if name not in self.images:
            return Unknown(f"the {name}'s image is not there", "docker compose build")
        if len(mounts) < len(targets):
            return NOT_YET
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
            return Unknown(f"no container could be made of {self.images[name].name}: {error}")
        try:
            container.start()
            code = container.wait(timeout=TIMEOUT_S)["StatusCode"]
            output = container.logs().decode(errors="replace").strip()
        except (DockerException, OSError) as error:
            return Unknown(f"a container of {self.images[name].name} did not run: {error}")
        finally:
            with suppress(DockerException):
                container.remove(force=True)
        return Refused(output.splitlines()[-1] if output else f"exit code {code}") if code else output

    def _mounts(self, service: Service, targets: tuple[str, ...]) -> list[str]:
        """Those of the service's volumes that are there: mounting one that is not would make it, unlabelled."""
        mounts = []
        for target in targets:
            mount = service.mount(target)
            source = self._source(mount.source) if mount else None
            if mount and source:
                mounts.append(f"{source}:{target}:{'ro' if mount.read_only else 'rw'}")
        return mounts

    def _source(self, key: str) -> str | None:
        """The engine's name of a volume that is there."""
        if key.startswith("/"):
            return key
        volume = self.stack.volumes.get(key)
        try:
            return str(self.client.volumes.get(volume.name).name) if volume else None
        except NotFound:
            return None
