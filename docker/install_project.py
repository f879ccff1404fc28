"""Install the packages of a project for the trainer's image: `install_project.py FOLDER TARGET [NAME]`.

FOLDER has the requirements files of the project, and NAME is TANDEM_REQUIREMENTS. TARGET gets only packages that the
image does not have, in the layout of a virtual environment. Every package of the image keeps its version. Without a
requirements file, nothing is installed. Some packages have no wheels: a compiler is installed if one is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from tandem_protocol.requirements import DEFAULT, VARIABLE, has_hashes

SENT = "requirements*.txt and constraints*.txt"
"""What the build gets of the project's folder, besides the file that TANDEM_REQUIREMENTS names."""
APT = "apt-get -qq update && apt-get -qq install --yes --no-install-recommends g++ >/dev/null"
_CONSTRAINT = re.compile(r"The user requested \(constraint\) (\S+?)==(\S+)")
_COMPILER = re.compile(r"\b(gcc|cc|compiler)\b")


def main(folder: Path, target: Path, name: str) -> int:
    """Install the packages. Returns the exit status: 0, or 2 for an error of the user."""
    target.mkdir(parents=True, exist_ok=True)
    file = folder / Path(name or DEFAULT).name
    if not file.exists():
        if not name and not file.is_symlink():
            return 0
        got = f"a link {DEFAULT} that leads out of the folder" if file.is_symlink() else f"{VARIABLE}={name}"
        return fail(
            f"got {got}, expected a file in the project's folder. Fix: put it there, and name it relative to it"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{line}\n" for line in installed()))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--prefix", str(target), "--constraint", constraints.name]
        # A lock with hashes has all packages. What it leaves out on purpose, pip would refuse.
        command += ["--no-deps"] if has_hashes(file) else []
        errors = pip(command, file)
        if errors and _COMPILER.search(errors) and not _CONSTRAINT.search(errors):
            print("Installing a compiler, and trying again.", flush=True)
            os.system(APT)  # noqa: S605 - a constant; without a compiler, pip fails as before
            errors = pip(command, file)
    return fail(explain(errors, file.name)) if errors else 0


def pip(command: list[str], file: Path) -> str:
    """Install `file`. Returns what pip wrote, if it fails. pip explains a conflict on stdout."""
    whole = [*command, "--requirement", str(file)]
    lines = []
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603 - pip
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines) or "pip failed" if process.returncode else ""


def installed() -> list[str]:
    """The packages of the image, as pins. pip itself may be replaced."""
    pins = {(dist.metadata["Name"], dist.version) for dist in distributions()}
    return sorted(f"{name}=={version}" for name, version in pins if name != "pip")


def explain(errors: str, name: str) -> str:
    """One message for what pip says."""
    if conflicts := dict(_CONSTRAINT.findall(errors)):
        packages = ", ".join(f"{package} (the image has {version})" for package, version in conflicts.items())
        return (
            f"{name} conflicts with packages that Tandem pins: {packages}. pip's explanation is above. Fix: allow "
            f"these versions in {name}, or choose a version of your package that works with them"
        )
    return f"pip cannot install {name}; its message is above. The build has only {SENT} of the project's folder"


def fail(message: str) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), "".join(sys.argv[3:])))
