"""The command line of `tandem plan`."""

from __future__ import annotations

from pathlib import Path

from ..subcommands import Commands, add

_PLAN = """
Estimate how long a step takes if devices are divided in other ways, and recommend one. The costs of a step come from
the folder of a run that was measured, from a file, or both: the file takes precedence.

The command computes. It starts nothing and uses no GPU.
"""
_EPILOG = """
examples:
  # eight GPUs, with the costs of a short run on two
  tandem plan project/runs/short --devices 8

  # compare lags; each generator takes two GPUs
  tandem plan project/runs/short --devices 8 --max-lag 0 1 4 \\
      --devices-per-generator 2

  # costs by hand, or some of them
  tandem plan --costs costs.yaml --devices 8
  tandem plan project/runs/short --costs longer.yaml --devices 8

exit codes:
  0  the estimate is printed
  2  a folder is not the folder of a run, or a cost is wrong or missing
"""


def add_plan(commands: Commands) -> None:
    """Add the command."""
    command = add(commands, "plan", "estimate how to divide devices between the services", _PLAN, _EPILOG)
    command.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folder of a measured run: PROJECT/runs/NAME. Several that differ in their generators or their batch also "
        "show how generators slow down with more completions (default: --costs says it all)",
    )
    command.add_argument(
        "--costs", type=Path, metavar="FILE", help="YAML file with costs of a step (default: those of the runs)"
    )
    devices = command.add_argument_group("devices")
    devices.add_argument(
        "--devices", type=int, required=True, metavar="N", help="devices to divide, such as GPUs (required)"
    )
    devices.add_argument(
        "--devices-per-generator",
        type=int,
        default=1,
        metavar="N",
        help="devices of a generator (default: %(default)s)",
    )
    devices.add_argument(
        "--run-trainer-devices",
        type=int,
        default=1,
        metavar="N",
        help="trainer devices of the measured runs (default: %(default)s)",
    )
    plan = command.add_argument_group("plan")
    plan.add_argument(
        "--max-lag", type=int, nargs="+", metavar="LAG", help="values of trainer.max_lag to compare (default: 0 1 4)"
    )
    plan.add_argument("--json", action="store_true", help="print the estimate as JSON (default: as text)")
