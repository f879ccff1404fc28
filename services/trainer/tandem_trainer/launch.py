"""`python -m tandem_trainer.launch ...`: start the trainer processes of one node. The entry point of the images.

One process is the trainer itself. Several run under `accelerate launch`. `supervise.py` starts failed ones again.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from tandem_protocol import logs
from tandem_protocol.config import load
from tandem_protocol.config.help import WideHelpFormatter
from tandem_protocol.config.trainer import TrainerSettings
from tandem_protocol.errors import StoreLocked
from tandem_protocol.folders import require_writable
from tandem_protocol.handover import PREFLIGHT_FILE, generator_failure, handed_over
from tandem_protocol.lock import Held, exclusive, project_in_use
from tandem_protocol.ports import listen
from tandem_protocol.run_state import LOCK_FILE
from tandem_protocol.script import script_command
from tandem_protocol.store import WeightStore

from . import script_run
from .__main__ import parse
from .run.stopping import STOPPED
from .supervise import Supervisor, newest_checkpoint

PREFIX = "TANDEM_TRAINER_"
LAUNCHER = "accelerate.commands.launch"
VARIABLES = {
    "PROCESSES": "Trainer processes on this node, one per device. (default: 1)",
    "NODES": "Nodes of the run. (default: 1)",
    "NODE_RANK": "Number of this node, from 0. Node 0 holds the rendezvous. (default: 0)",
    "RENDEZVOUS": "host:port of node 0, where all processes meet. (default: a free port; required with several nodes)",
    "RETRIES": "How often a failed trainer is started again before its next checkpoint. For one node. (default: 0)",
    "END_FILE": "File to write when the run is over, for generators that end with it. For one node. (default: none)",
}
"""Name without the prefix → description."""
SUPERVISOR_LOCK = "SUPERVISOR"
"""Name of a lock beside the end file: only its holder may end the run."""
ANY_PORT = "127.0.0.1:0"
"""Where the processes of one node meet. With port 0, accelerate takes a free port."""
LARGEST_PORT = 65535
DEFAULTS = {
    # Seconds that the launcher gives its processes after SIGTERM to finish their step and write a checkpoint. It is
    # less than the grace period of compose.yaml and of the chart.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # below, c10d warns of every host name that it cannot look up
}
"""Environment variables of the processes, if they are not set."""

_DESCRIPTION = """
Start as many trainer processes as the environment says: one is `python -m tandem_trainer`, several run under
`accelerate launch`. All arguments go to the trainer; `python -m tandem_trainer --help` lists them.

With TANDEM_SCRIPT, a TRL script with its arguments, they run the script: `python -m tandem_trainer.trl --help`.
"""
_EPILOG = """
examples:
  # one process
  python -m tandem_trainer.launch --config project/config.yaml

  # four processes on one machine, with sharded parameters
  TANDEM_TRAINER_PROCESSES=4 python -m tandem_trainer.launch \\
      --config project/config.yaml --trainer.learner.parallelism fsdp2

  # the second of two machines with eight processes each
  TANDEM_TRAINER_PROCESSES=8 TANDEM_TRAINER_NODES=2 TANDEM_TRAINER_NODE_RANK=1 \\
      TANDEM_TRAINER_RENDEZVOUS=first-node:29500 \\
      python -m tandem_trainer.launch --config project/config.yaml

exit codes: those of the trainer; 2 if a variable is wrong. If one of several processes fails, its exit code: 2 for a
mistake in the project, 128 + n after signal n.
"""


class InUse(ValueError):
    """Another trainer is at work, whose generators this one must not end."""


def main() -> int:
    """Run the trainer's processes, and return their exit code."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(help_text(), end="")
        return 0
    try:
        end_file = os.environ.get(f"{PREFIX}END_FILE")
        checks = {"--check", "--check-project"} & {*arguments}
        if end_file and not checks:
            with project_in_use():
                return run_to_end(arguments, Path(end_file))
        logs.configure()
        if _number(os.environ, "RETRIES", 0, least=0) and not checks:
            with project_in_use():
                return supervise(arguments)
        command = trainer_command(os.environ, arguments)
        if script_command():
            script_run.enter(os.environ, arguments)
        return start(command)
    except (ValueError, StoreLocked) as error:
        logs.report_error(error)
        return 2
    except OSError as error:  # such as a full disk
        logs.report_error(error)
        return 1


def start(command: Sequence[str]) -> int:
    """Become the trainer's only process, or start several and return their exit code."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if LAUNCHER in command:
        from .several import launch  # imports torch

        return launch(command[command.index(LAUNCHER) + 1 :])
    os.execve(sys.executable, list(command), os.environ)  # noqa: S606 - runs without a shell


def run_to_end(arguments: Sequence[str], end_file: Path) -> int:
    """Supervise the trainer, and write `end_file` when the run is over: finished, or failed for good.

    If the preflight has failed, this reports its failure, because Compose does not show the preflight's log.

    Raises:
        InUse, StoreLocked: another trainer is at work. Then nothing is ended.
        OSError: the end file cannot be written.
    """
    preflight = os.environ.get(PREFLIGHT_FILE)
    try:
        with exclusive(end_file.with_name(SUPERVISOR_LOCK), _name()):
            end_file.unlink(missing_ok=True)
            try:
                logs.configure()
                if preflight and (failure := handed_over(Path(preflight))):
                    logs.report_error(failure.message)
                    status = failure.status
                else:
                    status = supervise(arguments, end_file)
            except InUse:
                raise
            except ValueError as error:
                logs.report_error(error)
                status = 2
            if status not in STOPPED:
                end_file.touch()
            return status
    except Held as error:
        raise InUse(f"{error} is at work for these generators. Fix: wait for that trainer, or stop it.") from error


def supervise(arguments: Sequence[str], end_file: Path | None = None) -> int:
    """Run this module again without the variables of a supervisor, until the run is over. Returns its last exit code.

    Args:
        end_file: generators leave their failures beside it.

    Raises:
        ConfigError: the configuration cannot be read, or the run's folder cannot be written to.
        ValueError: the run has several nodes, or a variable is wrong.
        InUse, StoreLocked: another trainer uses the run's folder or the weight store.
    """
    trainer_command(os.environ, arguments)  # checks the variables
    refuse_several_nodes(os.environ)
    run = script_run.places(os.environ, arguments) if script_command() else places(arguments)
    with suppress(OSError):  # the trainer itself waits until a full disk has space
        require_writable(run.run_dir, "trainer.output_dir")
    require_free(run.run_dir, run.weights_dir)
    owned = {f"{PREFIX}RETRIES", f"{PREFIX}END_FILE"}
    supervisor = Supervisor(
        [sys.executable, "-m", "tandem_trainer.launch", *arguments],
        {name: value for name, value in os.environ.items() if name not in owned},
        retries=_number(os.environ, "RETRIES", 0, least=0),
        newest_checkpoint=run.newest_checkpoint,
        generator_failure=lambda: generator_failure(end_file) if end_file else None,
    )
    return supervisor.run()


def places(arguments: Sequence[str]) -> script_run.Places:
    """Return where the run of a project has its files.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    path, _, overrides = parse(arguments)
    settings, _ = load(TrainerSettings, path=path, overrides=overrides)
    run_dir = path.parent / settings.trainer.run_dir
    weights_dir = path.parent / settings.shared.weights_dir
    return script_run.Places(run_dir, weights_dir, partial(newest_checkpoint, run_dir))


def refuse_several_nodes(env: Mapping[str, str]) -> None:
    """Check that this machine has all processes of the run: it cannot start those of another one again.

    Raises:
        ValueError: the run has several nodes.
    """
    nodes = _number(env, "NODES", 1, least=1)
    given = [f"{PREFIX}{name}={env[PREFIX + name]}" for name in ("RETRIES", "END_FILE") if env.get(PREFIX + name)]
    if nodes > 1 and given:
        raise ValueError(
            f"got {' and '.join(given)} with {PREFIX}NODES={nodes}, expected neither: a node cannot start the "
            "processes of the others again, or know whether they have ended. Fix: unset it on every node, and have the "
            "scheduler start all nodes again together, as the chart's Job does"
        )


def require_free(run_dir: Path, weights_dir: Path) -> None:
    """Check that no other trainer is at work, whose generators this one would end.

    Raises:
        InUse: another trainer uses the run's folder.
        StoreLocked: another trainer writes the weight store.
    """
    try:
        if run_dir.exists():
            with exclusive(run_dir / LOCK_FILE, _name()):
                pass
    except Held as error:
        raise InUse(f"{run_dir} is in use by {error}. Fix: wait for that trainer, or stop it.") from error
    if weights_dir.exists():
        with WeightStore(weights_dir).writer(_name()):
            pass


def _name() -> str:
    return f"a supervisor, pid {os.getpid()} on {socket.gethostname()}"


def help_text() -> str:
    """Return the help, with the variables as if they were options: argparse only lays them out."""
    parser = argparse.ArgumentParser(
        usage="[TANDEM_TRAINER_...=VALUE] python -m tandem_trainer.launch\n"
        "           --config FILE [ARGUMENT OF THE TRAINER ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=WideHelpFormatter,
        add_help=False,
    )
    variables = parser.add_argument_group("environment")
    for name, text in VARIABLES.items():
        variables.add_argument(f"{PREFIX}{name}", help=text)
    return parser.format_help()


def trainer_command(env: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """Return the command that this process becomes.

    Raises:
        ValueError: a variable is not a number or too small, the rendezvous is not `host:port`, or its port is in use.
    """
    processes = _number(env, "PROCESSES", 1, least=1)
    nodes = _number(env, "NODES", 1, least=1)
    rank = _number(env, "NODE_RANK", 0, least=0)
    if rank >= nodes:
        raise ValueError(f"got {PREFIX}NODE_RANK={rank} of {PREFIX}NODES={nodes}, expected 0 to {nodes - 1}")
    script = script_command(env)
    module = "tandem_trainer.trl" if script else "tandem_trainer"
    trainer = ["-m", module, *arguments, *script]
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
        "gpu_ids": "all",  # instead of those in accelerate's own configuration file
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # --multi_gpu makes accelerate start several processes with torch's launcher, on CPUs too.
    return [sys.executable, "-m", LAUNCHER, "--multi_gpu", *flags, *trainer]


def _rendezvous(env: Mapping[str, str], nodes: int, rank: int) -> tuple[str, str]:
    """Return the host and port where all processes meet. Node 0 listens there."""
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
        raise ValueError(f"got {PREFIX}{name}={text}, expected an integer of at least {least}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
