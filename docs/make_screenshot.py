"""Draw docs/assets/screen.svg, the live screen of a finished run at one of its steps.

tandem demo examples/digits
.venv/bin/python docs/make_screenshot.py examples/digits/runs/digits 96
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tandem_cli.demo import _RUNNING
from tandem_cli.progress import GeneratorState, Progress
from tandem_cli.screen import RunHeader, render

TARGET = Path(__file__).parent / "assets" / "screen.svg"
WIDTH = 96
TITLE = """\
<title id="title">The live screen of a run</title>
<desc id="description">A terminal: steps, the reward rising over time, speed, and what each service does.</desc>
"""
FILES = ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl")


def cut(run_dir: Path, step: int, to: Path) -> None:
    """Copy what the run had written when it had finished `step`."""
    for name in FILES:
        lines = (run_dir / name).read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        (to / name).write_text("\n".join(kept) + "\n")
    (to / "status.json").write_text(json.dumps({"phase": "update", "since_unix_s": time.time()}))


def draw(run_dir: Path, step: int) -> str:
    """The SVG of the screen after `step`."""
    steps = json.loads((run_dir / "status.json").read_text())["step"]
    with tempfile.TemporaryDirectory() as folder:
        cut(run_dir, step, Path(folder))
        state = GeneratorState(ready=True, reason="", running=16, waiting=0)
        progress = Progress(Path(folder), steps, lambda: state)
        progress.poll()
        elapsed_s = sum(record.duration_s for record in progress.steps.records)
    header = RunHeader("digits", "model", "vllm", "examples/digits/runs/digits", (0,), (1,))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(render(progress, header, _RUNNING, elapsed_s, WIDTH))
    svg = console.export_svg(title="tandem demo examples/digits")
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)  # rich would fetch a font from another host
    titled = f'<svg role="img" aria-labelledby="title description"{{}}>\n{TITLE}'
    return re.sub(r"<svg([^>]*)>", lambda tag: titled.format(tag[1]), svg, count=1)


if __name__ == "__main__":
    TARGET.write_text(draw(Path(sys.argv[1]), int(sys.argv[2])))
