"""`tandem completion` in real interactive shells: TAB completes what is typed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_cli.__main__ import main
from tandem_cli.completion import SHELLS

TIMEOUT_S = 60.0
START = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(tandem completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -Uz compinit && compinit -u && eval "$(tandem completion zsh)"'),
    "fish": (["--no-config", "-i"], "tandem completion fish | source"),
}
"""Shell → options that ignore the user's configuration file, and the line that a user adds to that file."""
TANDEM = f"""#!/bin/sh
[ -t 1 ] || exec {sys.executable} -m tandem_cli "$@"
printf '\\nTYPED:%s:\\n' "$*"
"""
"""The program `tandem` on PATH. On a terminal it prints its arguments; otherwise it runs the real `tandem`."""
TYPED = [
    ("demo --eng\tmock", "demo --engine mock"),
    ("exp\t", "export"),
    ("comp\tfi\t", "completion fish"),
    ("demo --engine mo\t", "demo --engine mock"),
    ("gpus --driver c\t", "gpus --driver cdi"),
    ("runs com\tmyp\t", "runs compare myproject"),
    ("runs list myp\t", "runs list myproject"),
    ("demo myp\t", "demo myproject"),
    ("demo --plain myp\t", "demo --plain myproject"),
    ("doctor --project myp\t", "doctor --project myproject"),
    ("export myproject/ru\t", "export myproject/runs"),
    ("pl\tmyproject/ru\t", "plan myproject/runs"),
]
"""Words after `tandem`, with TAB, and the arguments that the command gets."""


class Terminal:
    """A shell in a pseudo-terminal."""

    def __init__(self, shell: str, folder: Path) -> None:
        env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(folder),
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
        }
        self._pid, self._main = pty.fork()  # fish needs a terminal that controls it, which Popen does not give
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe(shell, [shell, *START[shell][0]], env)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def read_arguments(self) -> str:
        """Return the arguments that `tandem` got."""
        text = ""
        end = time.monotonic() + TIMEOUT_S
        while not (typed := re.search("TYPED:(.*):", text)):
            ready, _, _ = select.select([self._main], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"tandem did not run: {text!r}"
            text += os.read(self._main, 4096).decode(errors="replace")
        return typed[1]

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._main)


@pytest.fixture(scope="module", params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    shell: str = request.param
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} on PATH")
    folder = tmp_path_factory.mktemp(shell)
    (folder / "bin").mkdir()
    (folder / "bin/tandem").write_text(TANDEM)
    (folder / "bin/tandem").chmod(0o755)
    (folder / "myproject/runs").mkdir(parents=True)
    (folder / "myproject.txt").touch()  # no project, so that it is not completed
    terminal = Terminal(shell, folder)
    terminal.type(f"{START[shell][1]}; tandem ready\n")
    assert terminal.read_arguments() == "ready"
    yield terminal
    terminal.close()


@pytest.mark.parametrize(("typed", "arguments"), TYPED, ids=[arguments for _, arguments in TYPED])
def test_tab_completes_what_is_typed(terminal: Terminal, typed: str, arguments: str) -> None:
    terminal.type(f"tandem {typed}\n")
    assert terminal.read_arguments().removesuffix("/") == arguments  # zsh drops the slash of a folder at its end


def test_tab_completes_after_a_path_to_the_command(terminal: Terminal) -> None:
    terminal.type("bin/tandem exp\t\n")
    assert terminal.read_arguments() == "export"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_names_every_command_and_is_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in ("demo", "runs", "gpus", "doctor", "export", "completion"):
        assert command in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["completion", "tcsh"])
    assert exit_.value.code == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
