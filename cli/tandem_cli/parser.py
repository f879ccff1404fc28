"""The command line of `tandem`: commands, options, and the help of each."""

from __future__ import annotations

import argparse
from pathlib import Path

from tandem_protocol.config.help import HelpFormatter

from .completion import SHELLS
from .plan.options import add_plan
from .run_list.options import add_runs
from .subcommands import CommandParser, Commands
from .subcommands import add as _add
from .watch.options import add_watch

_DESCRIPTION = "Run a Tandem project on this machine, and prepare the compose stack."
_EPILOG = """
examples:
  tandem demo                              # train examples/digits and watch it
  tandem run train.py                      # run a TRL script
  tandem runs project                      # list its runs
  tandem watch project/runs/mine           # see a run in the browser
  tandem gpus --generator 0-3 --trainer 4-7
  tandem doctor                            # will `docker compose up` work here?
  tandem export project/runs/mine --to model
  tandem plan project/runs/mine --devices 8  # how to divide eight GPUs?

`tandem COMMAND --help` explains a command.

exit codes:
  0  the command did its work
  1  it failed
  2  the command line or the project is wrong; the message says what
"""

_DEMO = """
Start a project's generator and trainer on this machine, show the run and sum it up.

The run starts from the beginning. The folder of an earlier run is renamed (runs/digits to runs/digits.1), never
deleted.

Any key of config.yaml can be set on the command line: --trainer.max_steps 5. `python -m tandem_generator --help` and
`python -m tandem_trainer --help` list the keys.
"""
_DEMO_EPILOG = """
examples:
  # the example project, with vLLM if it is installed
  tandem demo

  # another project, with the mock engine and other settings
  tandem demo path/to/project --engine mock \\
      --trainer.max_steps 5 --trainer.optim.learning_rate 1e-5

  # continue a run that was stopped
  tandem demo path/to/project --resume

exit codes:
  0    the run is done
  1    a service failed
  2    the command line or the project is wrong; the message says what
  130  stopped by Ctrl-C
  143  stopped by SIGTERM
"""

_RUN = """
Run a TRL script on this machine, with a generator for it, show the run and sum it up.

The script is not edited: its GRPOTrainer(use_vllm=True, vllm_mode="server") samples from the generator. The generator
loads the model that the script trains. Everything after SCRIPT belongs to the script.

The folder runs/NAME gets the metrics and logs of the run. The script's own output goes where the script
says. tandem.yaml beside the script may have the sections shared, generator and trainer of a project's config.yaml, and
any of their keys can be set before SCRIPT: --generator.dtype=float32.
"""
_RUN_EPILOG = """
examples:
  # with vLLM if it is installed
  tandem run train.py --learning_rate 1e-6

  # without vLLM: every part runs, but the tokens are random
  tandem run --mock train.py

  # eight GPUs: two generate, six train with one process each
  tandem run --generator-gpus 0-1 --trainer-gpus 2-7 \\
      --generator.data_parallel_size=2 train.py

  # from the newest checkpoint of the script's output
  tandem run --resume train.py

exit codes:
  0    the script ended without an error
  1    the script or the generator failed
  2    the command line, the script or a setting is wrong; the message says
       what
  130  stopped by Ctrl-C
  143  stopped by SIGTERM
"""

_GPUS = """
Give each service of the compose stack its GPUs. Writes compose.devices.yaml and .env beside Tandem's compose.yaml,
which `docker compose up` uses. GPUs that both services would get are refused, and so is a number of trainer GPUs that
does not divide trainer.rollout.num_prompts.

DEVICES is a list with commas: indexes, ranges, UUIDs or CDI names, such as 0-3 or 0,2,GPU-8932f937.
"""
_GPUS_EPILOG = """
examples:
  # eight GPUs: half for each service, one copy of the model on four
  tandem gpus --generator 0-3 --trainer 4-7

  # four copies of the model, each on one GPU
  tandem gpus --generator 0-3 --trainer 4-7 --tensor-parallel 1

  # GPUs that the engine knows by CDI names
  tandem gpus --driver cdi --generator nvidia.com/gpu=0 \\
      --trainer nvidia.com/gpu=1

exit codes:
  0  the files are written
  1  a file could not be written, for example because the disk is full
  2  the command line or the project is wrong; the message says what
"""

_DOCTOR = """
Check whether `docker compose up` will work on this machine: the Docker engine, the merged compose files, images,
devices, memory, disk and the model. Run it in the folder of compose.yaml. The report says how to fix what is wrong.
"""
_DOCTOR_EPILOG = """
examples:
  tandem doctor
  tandem doctor --project path/to/project
  tandem doctor --json

exit codes:
  0  no check failed; there may be warnings
  1  a check failed
  2  the command line is wrong
"""

_EXPORT = """
Write the model and tokenizer of a checkpoint as a Hugging Face folder, for vLLM, transformers or the hub.
"""
_EXPORT_EPILOG = """
examples:
  # the last checkpoint
  tandem export path/to/project/runs/mine --to my-model

  # the checkpoint with the best evaluation (trainer.checkpoint.keep_best)
  tandem export path/to/project/runs/mine --checkpoint best --to my-model

exit codes:
  0  the folder is written
  2  the checkpoint does not exist, or the folder cannot be written
"""

_COMPLETION = """
Print a script with which the shell completes commands, options, choices and folders of `tandem` when TAB is pressed.
"""
_COMPLETION_EPILOG = """
examples:
  # this shell only
  eval "$(tandem completion bash)"
  eval "$(tandem completion zsh)"
  tandem completion fish | source

  # every new shell
  echo 'eval "$(tandem completion bash)"' >> ~/.bashrc
  echo 'eval "$(tandem completion zsh)"' >> ~/.zshrc
  tandem completion fish > ~/.config/fish/completions/tandem.fish

zsh needs its completion system, which most set-ups load: `autoload -Uz compinit && compinit` before the line in
~/.zshrc.

exit codes:
  0  the script is printed
  2  the shell is not one of bash, zsh and fish
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser. It sets `command` to the name of the command, or to None without one."""
    parser = argparse.ArgumentParser(
        prog="tandem", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=HelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=CommandParser)
    _add_demo(commands)
    _add_run(commands)
    add_watch(commands)
    add_runs(commands)
    _add_gpus(commands)
    _add_doctor(commands)
    _add_export(commands)
    add_plan(commands)
    _add_completion(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    command = _add(commands, "demo", "train a project on this machine and watch it", _DEMO, _DEMO_EPILOG)
    command.usage = (
        "tandem demo [-h] [--engine {vllm,mock} | --mock] [--resume] [--check]\n"
        "                   [--plain] [--SECTION.KEY VALUE ...] [PROJECT]"
    )
    command.add_argument(
        "project",
        nargs="?",
        type=Path,
        default=Path("examples/digits"),
        metavar="PROJECT",
        help="folder with config.yaml (default: %(default)s)",
    )
    run = command.add_argument_group("run")
    engine = run.add_mutually_exclusive_group()
    engine.add_argument(
        "--engine",
        choices=("vllm", "mock"),
        help="engine of the generator (default: generator.engine of the project; mock if vLLM is not installed)",
    )
    engine.add_argument(
        "--mock", dest="engine", action="store_const", const="mock", help="short for --engine mock (default: as above)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the earlier run from its last checkpoint (default: start from the beginning)",
    )
    output = command.add_argument_group("output")
    output.add_argument(
        "--check",
        action="store_true",
        help="print the settings of both services with their sources, and start nothing (default: train)",
    )
    output.add_argument(
        "--plain",
        action="store_true",
        help="print one line per step (default: a live screen, or one line per step when stdout is not a TTY)",
    )


def _add_run(commands: Commands) -> None:
    command = _add(commands, "run", "run a TRL script with a generator on this machine", _RUN, _RUN_EPILOG)
    command.usage = (
        "tandem run [-h] [--mock] [--model MODEL] [--port PORT] [--processes N]\n"
        "                  [--generator-gpus DEVICES] [--trainer-gpus DEVICES]\n"
        "                  [--config FILE] [--resume] [--plain]\n"
        "                  [--SECTION.KEY=VALUE ...] SCRIPT [ARGUMENT ...]"
    )
    command.add_argument("script", type=Path, metavar="SCRIPT", help="the TRL script (required)")
    command.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="arguments of the script (default: none)"
    )
    generator = command.add_argument_group("generator")
    generator.add_argument("--mock", action="store_true", help="sample random tokens, without vLLM (default: vLLM)")
    generator.add_argument(
        "--model", metavar="MODEL", help="model of the generator (default: the one that the script trains)"
    )
    generator.add_argument("--port", type=int, metavar="PORT", help="port of the generator (default: a free one)")
    generator.add_argument(
        "--generator-gpus", metavar="DEVICES", help="GPUs of the generator (default: the first, if there are several)"
    )
    trainer = command.add_argument_group("trainer")
    trainer.add_argument(
        "--processes", type=int, metavar="N", help="trainer processes (default: one, or one per GPU of --trainer-gpus)"
    )
    trainer.add_argument(
        "--trainer-gpus", metavar="DEVICES", help="GPUs of the trainer (default: the second, if there are several)"
    )
    run = command.add_argument_group("run")
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default: tandem.yaml beside the script, if it exists)"
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="begin at the newest checkpoint in the script's output (default: as the script says)",
    )
    run.add_argument(
        "--plain",
        action="store_true",
        help="print one line per step (default: a live screen, or one line per step when stdout is not a TTY)",
    )


def _add_gpus(commands: Commands) -> None:
    command = _add(commands, "gpus", "give each service of the compose stack its GPUs", _GPUS, _GPUS_EPILOG)
    devices = command.add_argument_group("devices")
    devices.add_argument("--generator", required=True, metavar="DEVICES", help="GPUs of the generator (required)")
    devices.add_argument(
        "--trainer", required=True, metavar="DEVICES", help="GPUs of the trainer, with one process per GPU (required)"
    )
    devices.add_argument(
        "--driver",
        choices=("nvidia", "cdi"),
        default="nvidia",
        help="what hands the GPUs to containers: NVIDIA's container runtime, or CDI (default: %(default)s)",
    )
    devices.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="GPUs that share one copy of the model; the copies run side by side (default: all of the generator's)",
    )
    stack = command.add_argument_group("stack")
    _add_project(stack)
    stack.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="folder of Tandem's compose.yaml (default: the current folder, or the nearest folder above it that has "
        "one)",
    )


def _add_doctor(commands: Commands) -> None:
    command = _add(commands, "doctor", "check whether the compose stack will run here", _DOCTOR, _DOCTOR_EPILOG)
    _add_project(command)
    command.add_argument(
        "--json",
        action="store_true",
        help="print the findings as JSON (default: as text)",
    )


def _add_project(container: argparse._ActionsContainer) -> None:
    container.add_argument(
        "--project",
        type=Path,
        metavar="DIR",
        help="project of the stack (default: TANDEM_PROJECT, from the environment or .env, or examples/digits)",
    )


def _add_export(commands: Commands) -> None:
    command = _add(commands, "export", "write a checkpoint as a Hugging Face folder", _EXPORT, _EXPORT_EPILOG)
    command.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run: PROJECT/runs/NAME (required)")
    command.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help="last, a step, or best (the best evaluation) (default: %(default)s)",
    )
    command.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="folder to write, new or empty (required)"
    )


def _add_completion(commands: Commands) -> None:
    command = _add(commands, "completion", "print a completion script for a shell", _COMPLETION, _COMPLETION_EPILOG)
    command.add_argument("shell", choices=SHELLS, help="shell that reads the script (required)")
