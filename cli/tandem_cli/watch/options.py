"""The command line of `tandem watch`."""

from __future__ import annotations

from pathlib import Path

from ..subcommands import Commands, add

_WATCH = """
Serve a web page of a run: curves, rollouts and events, while the run goes on and afterwards. Several runs are drawn
into the same charts.

The page only reads the files in the run's folder. It needs no network, and it needs the token in the address that this
command prints.
"""
_EPILOG = """
examples:
  tandem watch path/to/project/runs/mine

  # compare two runs
  tandem watch path/to/project/runs/mine path/to/project/runs/mine.1

  # another port, if 8600 is in use
  tandem watch path/to/project/runs/mine --port 8601

exit codes:
  0    the page has ended
  2    a folder is not the folder of a run, or the port is in use
  130  ended by Ctrl-C
  143  ended by SIGTERM
"""


def add_watch(commands: Commands) -> None:
    command = add(commands, "watch", "show runs in the browser: curves, rollouts, events", _WATCH, _EPILOG)
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run: PROJECT/runs/NAME (required)"
    )
    command.add_argument(
        "--port", type=int, default=8600, metavar="PORT", help="port of the page; 0: a free one (default: %(default)s)"
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; any other than the default can be reached from other machines, without encryption "
        "(default: %(default)s, this machine only)",
    )
