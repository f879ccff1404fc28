"""The worst child process that a service may have: it has its own session and ignores SIGTERM."""

import subprocess
import sys

_CODE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"


def start_stubborn_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", _CODE], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
