"""`python -m tandem_trainer.launch …`: as many trainer processes as the environment says; the images' entry point.

TANDEM_TRAINER_PROCESSES is the number of processes on this node, one a device (default 1). With several nodes,
TANDEM_TRAINER_NODES is their number, TANDEM_TRAINER_NODE_RANK which one this is, and TANDEM_TRAINER_RENDEZVOUS the
`host:port` of the first (on one node the default is any free port). One process alone is the trainer itself; several
run under `accelerate launch`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from tandem_protocol.ports import listen

PREFIX = "TANDEM_TRAINER_"
ANY_PORT = "127.0.0.1:0"
"""Where processes of one node meet: accelerate takes a free port."""
LARGEST_PORT = 65535
SHUTDOWN_TIMEOUT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270"}
"""Seconds that the launcher leaves its processes after SIGTERM for their step and a checkpoint; within the grace of
compose.yaml and of the chart."""


def main() -> int:
    try:
        command = trainer_command(os.environ, sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.execve(sys.executable, command, {**SHUTDOWN_TIMEOUT, **os.environ})  # noqa: S606 - no shell is wanted


def trainer_command(env: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """The command to become, from the environment.

    Raises:
        ValueError: a number is not one or too small, the rendezvous is not `host:port`, or its port is in use.
    """
    processes, nodes = _number(env, "PROCESSES", 1, least=1), _number(env, "NODES", 1, least=1)
    rank = _number(env, "NODE_RANK", 0, least=0)
    if rank >= nodes:
        raise ValueError(f"got {PREFIX}NODE_RANK={rank} of {PREFIX}NODES={nodes}, expected 0 to {nodes - 1}")
    trainer = ["-m", "tandem_trainer", *arguments]
    if processes == nodes == 1:
        return [sys.executable, *trainer]
    host, port = _rendezvous(env, nodes, rank)
    options = {
        "num_processes": processes * nodes,  # accelerate counts those of all nodes
        "num_machines": nodes,
        "machine_rank": rank,
        "main_process_ip": host,
        "main_process_port": port,
        "mixed_precision": "no",  # the trainer's configuration decides
        "dynamo_backend": "no",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # --multi_gpu is accelerate's word for several processes under torch's launcher, on CPUs too.
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *flags, *trainer]


def _rendezvous(env: Mapping[str, str], nodes: int, rank: int) -> tuple[str, str]:
    """Host and port where all processes meet; the first node listens there."""
    name = f"{PREFIX}RENDEZVOUS"
    rendezvous = env.get(name) or ("" if nodes > 1 else ANY_PORT)
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LARGEST_PORT or (nodes > 1 and not int(port)):
        raise ValueError(f"got {name}={rendezvous}, expected host:port of the first node")
    if rank == 0 and int(port):
        listen("", int(port), f"the port of {name}").close()
    return host, port


def _number(env: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = env.get(f"{PREFIX}{name}") or str(default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"got {PREFIX}{name}={text}, expected a whole number from {least} on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
