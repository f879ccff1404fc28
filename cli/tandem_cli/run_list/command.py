"""Run `tandem runs list` and `tandem runs compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tandem_protocol.config import ConfigError

from ..extras import require
from ..screen import printable, shown
from .chart import chart
from .compare import Compared, differences, read_runs
from .find import default_folder, find_folders, find_run
from .options import IMAGES
from .picture import save_html, save_image
from .summary import newest_first, summarize
from .table import comparison, listing, settings_table

_WIDTH = 160
"""Width of the tables if stdout is not a terminal. Its lines must not depend on the width of a screen."""
_CHART_WIDTH, _CHART_HEIGHT = 72, 12


def list_runs(folder: Path | None, *, as_json: bool) -> int:
    """Print the runs in a folder, the newest first.

    Raises:
        ConfigError: the folder does not exist, or has no runs.
    """
    where = default_folder() if folder is None else folder
    runs = newest_first(map(summarize, find_folders(where)))
    if as_json:
        _print_json([run.as_json() for run in runs])
    elif runs:
        _console().print(listing(runs))
    else:
        print(f"No runs in {shown(where.absolute())} yet.")
    return 0


def compare_runs(runs: Sequence[Path], *, as_json: bool, save: Path | None) -> int:
    """Print the figures of runs side by side, the settings that differ, and a chart of the rewards.

    Raises:
        ConfigError: a run does not exist, there is only one, or the picture cannot be made.
        OSError: the picture cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError(
            "got one run, expected two or more to compare. Fix: name another one; `tandem runs` lists them"
        )
    if save:
        _check_picture(save)
    compared = read_runs([find_run(run) for run in runs])
    settings = differences(compared)
    if as_json:
        _print_json({"runs": [run.as_json() for run in compared], "settings": settings})
    else:
        _print_comparison(compared, settings)
    if save:
        (save_html if save.suffix == ".html" else save_image)(compared, save)
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"Wrote {printable(str(save))}"))
    return 0


def _print_comparison(compared: Sequence[Compared], settings: dict[str, list[str | None]]) -> None:
    console = _console()
    console.print(comparison(compared))
    if settings:
        console.print(settings_table(compared, settings))
    without = [run.label for run in compared if not run.settings]
    if without:
        console.print(
            Text(f"The settings of {', '.join(without)} are not known: config.resolved is missing.", style="dim")
        )
    console.print(chart(compared, min(_CHART_WIDTH, console.width), _CHART_HEIGHT))


def _check_picture(save: Path) -> None:
    """Check, before anything is read, that the picture can be made.

    Raises:
        ConfigError: its suffix is unknown, or a library is missing.
    """
    if save.suffix not in IMAGES:
        raise ConfigError(f"got --save {save}, expected a file that ends in {', '.join(IMAGES)}")
    if save.suffix == ".html":
        require("tandem runs compare --save FILE.html", "watch", libraries=("plotly",))
    else:
        require(f"tandem runs compare --save FILE{save.suffix}", "demo", libraries=("matplotlib",))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
