"""The command: gather facts, run the checks, print the findings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from .checks import examine
from .finding import Finding
from .gather import gather

WORDS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def doctor(project: Path | None, *, as_json: bool) -> int:
    """Print the findings and return the exit code: 1 when a check fails, else 0."""
    findings = examine(gather(project.absolute() if project else None))
    if as_json:
        json.dump([asdict(finding) for finding in findings], sys.stdout, indent=1)
        print()
    else:
        show(findings, Console(highlight=False))
    return int(any(finding.status == "fail" for finding in findings))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print one line per finding, with its fix on the next line."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        word, style = WORDS[finding.status]
        line = Text.assemble((f"{word:<4}", style), f"  {finding.name:<{width}}  {finding.message}")
        console.print(line, soft_wrap=True)
        if finding.fix:
            console.print(Text(f"{'':<{width + 8}}Fix: {finding.fix}", style="bold"), soft_wrap=True)
