"""The command line of `tandem runs`."""

from __future__ import annotations

from pathlib import Path

from ..subcommands import Commands, add

RUNS_ENV = "TANDEM_RUNS"
"""Environment variable with the folder that is listed if the command line names none."""
COMPARE, LIST = "compare", "list"
IMAGES = (".svg", ".png", ".html")

_RUNS = """
List the runs of a project: what became of each, its last step, its reward and its best evaluation. `tandem runs FOLDER`
is short for `tandem runs list FOLDER`.
"""
_EPILOG = """
examples:
  # the runs of the project in this folder
  tandem runs

  tandem runs path/to/project

  # two runs side by side
  tandem runs compare runs/mine runs/mine.1

exit codes:
  0  the runs are listed or compared
  1  a picture cannot be written
  2  a folder does not exist or is not the folder of runs
"""
_LIST = """
List the runs of a project, the newest first.

A run is running, finished, stopped (it can be resumed), failed, or dead: its status says that it runs, but no process
holds its lock. A copy of a running run is shown as dead, too.

The reward is the mean over the last 10 steps, and the duration the time that the steps took.
"""
_LIST_EPILOG = """
examples:
  tandem runs list path/to/project

  # for a script
  tandem runs --json > runs.json

exit codes:
  0  the runs are listed, even if there are none
  2  the folder does not exist, or it has no runs
"""
_COMPARE = """
Compare runs: a table of their figures, the settings that differ, and a chart of their rewards. A RUN is a folder, or
the name of a run of the project in this folder.
"""
_COMPARE_EPILOG = """
examples:
  tandem runs compare runs/mine runs/mine.1

  # a picture; .html can be zoomed in a browser
  tandem runs compare mine mine.1 --save rewards.svg

exit codes:
  0  the comparison is printed
  1  the picture cannot be written
  2  a run does not exist, or a library for the picture is missing
"""


def add_runs(commands: Commands) -> None:
    command = add(commands, "runs", "list the runs of a project, and compare them", _RUNS, _EPILOG)
    command.default = LIST
    command.usage = (
        "tandem runs [list] [--json] [FOLDER]\n       tandem runs compare [--json] [--save FILE] RUN RUN [RUN ...]"
    )
    actions = command.add_subparsers(title="commands", dest="runs_command", metavar="COMMAND")
    _add_list(actions)
    _add_compare(actions)


def _add_list(commands: Commands) -> None:
    command = add(commands, LIST, "list the runs of a project; this is the default", _LIST, _LIST_EPILOG)
    command.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help=f"folder of a project, of its runs, or of one run (default: {RUNS_ENV}, or the current folder)",
    )
    command.add_argument("--json", action="store_true", help="print the runs as JSON (default: as a table)")


def _add_compare(commands: Commands) -> None:
    command = add(commands, COMPARE, "compare runs as a table and a chart", _COMPARE, _COMPARE_EPILOG)
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder or name of a run; at least two (required)"
    )
    command.add_argument("--json", action="store_true", help="print the comparison as JSON (default: as a table)")
    command.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write a picture, too: .svg and .png need the extra [demo] of tandem-cli, .html the extra [watch] "
        "(default: none)",
    )
