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

  # all runs of a project, also those that begin later
  tandem watch --all path/to/project/runs

  # another port, if 8600 is in use
  tandem watch path/to/project/runs/mine --port 8601

environment:
  TANDEM_WATCH_TOKEN, TANDEM_WATCH_TOKEN_FILE
       the token of the page, or a file with it (default: a new one per start)

exit codes:
  0    the page has ended
  2    a folder is not the folder of a run, or the port is in use
  130  ended by Ctrl-C
  143  ended by SIGTERM
"""


def add_watch(commands: Commands) -> None:
    command = add(commands, "watch", "show runs in the browser: curves, rollouts, events", _WATCH, _EPILOG)
    command.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folder of a run: PROJECT/runs/NAME (required without --all)"
    )
    command.add_argument(
        "--all",
        type=Path,
        dest="parent",
        metavar="FOLDER",
        help="show all runs in this folder, and those that begin later (default: the runs that you name)",
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
    command.add_argument(
        "--url",
        metavar="URL",
        help="address at which browsers reach the page through a proxy or a published port, such as "
        "https://watch.example.com; its name is accepted (default: that of --host and --port)",
    )
