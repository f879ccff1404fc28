"""Takes the place of a cluster: runs the pods of a rendered chart with podman, on their own network and volumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import docker
import yaml

from support.helm import Object
from support.pods import Pod, manifest
from tandem_cli.testing import IMAGE_PREFIX, is_orphan, unique_name

PAGE_BYTES = 4096
PLAY_TIMEOUT_S = 60.0


def podman(*words: str, stdin: str = "", timeout_s: float = PLAY_TIMEOUT_S) -> str:
    """Run a podman command and return its output. It must succeed."""
    done = _run(words, stdin, timeout_s)
    assert done.returncode == 0, (
        f"podman {' '.join(words)} ended with exit code {done.returncode}: {done.stdout}{done.stderr}"
    )
    return done.stdout.strip()


def logs(container: str) -> str:
    """Return the output of a container."""
    done = _run(("logs", container))
    return done.stdout + done.stderr


def _run(words: Sequence[str], stdin: str = "", timeout_s: float = PLAY_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    command = ["podman", "--log-level=error", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s)


def load_images(*names: str) -> None:
    """Load images of the Docker engine into podman's store, unless podman has the same ones.

    Args:
        names: without the prefix that TANDEM_IMAGES gives them in the engine.
    """
    for name in names:
        image = docker.from_env(timeout=60).images.get(IMAGE_PREFIX + name).id.removeprefix("sha256:")
        if image in podman("images", "--all", "--quiet", "--no-trunc"):
            podman("tag", image, f"localhost/{name}")
            continue
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
            subprocess.run(["podman", "load", "--quiet"], stdin=save.stdout, check=True, timeout=900)
        podman("tag", image, f"localhost/{name}")
        podman("image", "prune", "--force")


class Cluster:
    """Runs the pods of a rendered chart. Names of pods, volumes and the network begin with the cluster's name."""

    def __init__(self) -> None:
        self.name = unique_name()
        self._addresses: dict[str, str] = {}
        podman("network", "create", "--internal", self.name)

    # -- volumes: the protocol support.pods.Volumes ---------------------------------------------------------------

    def own(self, name: str) -> str:
        return f"{self.name}-{name}"

    def claim(self, name: str, group: int) -> str:
        """Create a volume with the group and mode that kubelet gives it for an fsGroup, and return its name."""
        if self._volume(name, f"o=uid=0,gid={group}"):
            self.folder(name).chmod(0o2775 if group else 0o755)
        return self.own(name)

    def scratch(self, name: str, size: str, group: int) -> str:
        """Create a volume for an emptyDir. It is in memory, so that its size is enforced."""
        matched = re.fullmatch(r"(\d+)([KMG])i", size)
        assert matched, f"got {size}, expected a size such as 64Mi"
        number, unit = matched.groups()
        pages = int(number) * 1024 ** (1 + "KMG".index(unit)) // PAGE_BYTES
        self._volume(name, "type=tmpfs", "device=tmpfs", f"o=nr_blocks={pages},mode=2777,uid=0,gid={group}")
        return self.own(name)

    def _volume(self, name: str, *options: str) -> bool:
        """Create a volume. Return False if it existed."""
        if self.own(name) in podman("volume", "ls", "--quiet").split():
            return False
        podman("volume", "create", *(word for option in options for word in ("--opt", option)), self.own(name))
        return True

    def folder(self, claim: str, path: str = ".") -> Path:
        """Return the folder of a claim's files on this machine."""
        return Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", self.own(claim))) / path

    # -- pods ----------------------------------------------------------------------------------------------------

    def play(self, objects: Sequence[Object], pods: Sequence[Pod], *, timeout_s: float) -> None:
        """Start pods in parallel, each after its init containers have ended. Returns when all are running."""
        for pod in pods:
            for volume in pod.spec["volumes"]:
                if claim := volume.get("persistentVolumeClaim"):
                    self.claim(claim["claimName"], pod.group)
        pool = ThreadPoolExecutor(len(pods))
        tasks = [pool.submit(self._play, pod, objects, timeout_s) for pod in pods]
        pool.shutdown(wait=False)
        done, pending = wait(tasks, timeout=timeout_s + PLAY_TIMEOUT_S, return_when=FIRST_EXCEPTION)
        if pending:  # one failed or time is up: the others may wait for it forever
            _remove({"pod": _existing(self.name)["pod"]})
            wait(pending, timeout=PLAY_TIMEOUT_S)
        for task in done:
            task.result()
        assert not pending, f"{len(pending)} of {len(pods)} pods did not start within {timeout_s} s"

    def _play(self, pod: Pod, objects: Sequence[Object], timeout_s: float) -> None:
        for init in pod.inits:
            container = self.start_init(pod, objects, init)
            assert self.exit_code(container, timeout_s) == 0, logs(container)
        self._kube_play(manifest(pod, objects, self), pod.names)

    def start_init(self, pod: Pod, objects: Sequence[Object], init: Object) -> str:
        """Start one of a pod's init containers, and return the name of the container."""
        self._kube_play(manifest(pod, objects, self, init), aliases=())
        return self.own(f"{pod.name}-{init['name']}-{init['name']}")

    def _kube_play(self, documents: Sequence[Object], aliases: Sequence[str]) -> None:
        network = ",".join([f"alias={alias}" for alias in aliases])
        podman("kube", "play", "--network", f"{self.name}:{network}", "-", stdin=yaml.safe_dump_all(documents))

    def container(self, pod: Pod) -> str:
        return self.own(f"{pod.name}-{pod.container['name']}")

    def wait(self, pod: Pod, *, timeout_s: float) -> int:
        """Wait until a pod ends by itself, and return its exit code."""
        return self.exit_code(self.container(pod), timeout_s)

    def exit_code(self, container: str, timeout_s: float) -> int:
        """Wait for the end of a container."""
        return int(podman("wait", container, timeout_s=timeout_s))

    def logs(self, pod: Pod) -> str:
        return logs(self.container(pod))

    def python(self, pod: Pod, code: str) -> str:
        """Run Python `code` in a running pod and return what it prints."""
        return podman("exec", self.container(pod), "python3", "-c", code)

    def address(self, pod: Pod) -> str:
        if pod.name not in self._addresses:
            infra = json.loads(podman("pod", "inspect", self.own(pod.name)))["InfraContainerID"]
            networks = json.loads(podman("inspect", infra))[0]["NetworkSettings"]["Networks"]
            self._addresses[pod.name] = networks[self.name]["IPAddress"]
        return self._addresses[pod.name]

    def inspect(self, pod: Pod) -> Object:
        """Return what `podman inspect` reports of a pod's container."""
        (found,) = json.loads(podman("inspect", self.container(pod)))
        return dict(found)

    def kill(self, pod: Pod) -> None:
        """Kill a container's process, as in a crash. `podman kill` would end the pod, too."""
        os.kill(self.inspect(pod)["State"]["Pid"], signal.SIGKILL)

    def stop(self, pod: Pod) -> int:
        """End a pod as kubelet does (preStop, SIGTERM, SIGKILL after the grace period), and return its exit code."""
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        if hook := pod.container.get("lifecycle", {}).get("preStop"):
            podman("exec", self.container(pod), *hook["exec"]["command"])
        # Stop only the container: `podman pod stop` takes the pod's network down at the same time.
        podman("stop", "--time", str(grace_s), self.container(pod), timeout_s=grace_s + PLAY_TIMEOUT_S)
        return self.wait(pod, timeout_s=PLAY_TIMEOUT_S)

    # -- the end -------------------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Return the names of all pods, volumes and networks of this cluster."""
        return [name for names in _existing(self.name).values() for name in names]

    def down(self) -> None:
        _remove(_existing(self.name))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Create a cluster, and remove it afterwards."""
    made = Cluster()
    try:
        yield made
    finally:
        made.down()


def sweep() -> None:
    """Remove the pods, volumes and networks of killed test processes."""
    _remove({kind: [name for name in names if is_orphan(name)] for kind, names in _existing().items()})


REMOVE = {"pod": ("--force", "--time", "0"), "volume": ("--force",), "network": ()}
"""Kinds of podman's objects in the order of removal, with the options of `podman KIND rm`."""


def _existing(prefix: str = "") -> dict[str, list[str]]:
    listed = {kind: podman(kind, "ls", "--format", "{{.Name}}").split() for kind in REMOVE}
    return {kind: [name for name in names if name.startswith(prefix)] for kind, names in listed.items()}


def _remove(existing: dict[str, list[str]]) -> None:
    for kind, names in existing.items():
        if names:
            podman(kind, "rm", *REMOVE[kind], *names)
