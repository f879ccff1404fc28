"""Run a TRL script on Tandem's client, and record with which versions each step was sampled.

python -m tandem_trainer.trl trl_recorded.py FILE SCRIPT ARGUMENTS
"""

import json
import runpy
import sys
import time
from pathlib import Path

from tandem_trainer.trl.client import TandemClient

_sample = TandemClient._sample


def sample(client, prompts, given):
    began = time.monotonic()
    completions = _sample(client, prompts, given)
    line = {
        "step": client._trainer().state.global_step,
        "versions": sorted({str(span.version) for completion in completions for span in completion.versions}),
        "completions": len(completions),
        "seconds": time.monotonic() - began,
    }
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    return completions


TandemClient._sample = sample  # type: ignore[method-assign]  # in this process only
file = Path(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
