"""A fake trainer for tests of the `tandem` command. It writes the trainer's files and has a stubborn child process.

FAKE_TRAINER_EXIT is its exit code. After SIGTERM it finishes its step, writes `checkpoint` and exits.
"""

import argparse
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from stubborn import start_stubborn_child

RUN = Path("runs/default")
EXIT_CODE = int(os.environ.get("FAKE_TRAINER_EXIT", "0"))


def wait_for_generator() -> None:
    (url,) = json.loads(os.environ["TANDEM__SHARED__GENERATORS"])
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.02)


def append(name: str, record: dict[str, object]) -> None:
    with (RUN / name).open("a") as file:
        file.write(json.dumps(record) + "\n")


def take_step(step: int) -> None:
    time.sleep(0.05)
    timings = {"wait_for_rollouts_s": 0.03, "update_s": 0.01, "publish_s": 0.01, "checkpoint_s": 0.0}
    append(
        "metrics.jsonl",
        {"step": step, "version": f"{step}.1", "reward_mean": step / 10, "reward_std": 0.1, "loss": 0.0,
         "grad_norm": 1.0, "kl_sampler": 1e-4, "lag_max": 1, "completion_tokens_mean": 5.0, "rollout_tokens": 100,
         "groups_skipped": 0, "timings": timings},
    )  # fmt: skip
    append("rollouts.jsonl", {"step": step, "prompt": "1+1=", "completion": "2\x1b[2J", "reward": 1.0})
    status = {"phase": "update", "step": step, "version": f"{step}.1", "since_unix_s": time.time()}
    (RUN / ".status").write_text(json.dumps(status))
    (RUN / ".status").replace(RUN / "status.json")


parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True)
parser.add_argument("--trainer.max_steps", dest="max_steps", type=int, default=3)
parser.add_argument("--check", action="store_true")
arguments, _ = parser.parse_known_args()
if arguments.check:
    print("checked trainer")
    sys.exit(0)

asked_to_stop = False


def on_sigterm(*_: object) -> None:
    global asked_to_stop
    asked_to_stop = True


signal.signal(signal.SIGTERM, on_sigterm)
start_stubborn_child()
wait_for_generator()
append("eval.jsonl", {"step": 0, "reward_mean": 0.25})
for step in range(1, arguments.max_steps + 1):
    take_step(step)
    if asked_to_stop:
        (RUN / "checkpoint").write_text(str(step))
        sys.exit(EXIT_CODE)
append("eval.jsonl", {"step": arguments.max_steps, "reward_mean": 0.75})
print("the last words of the trainer", flush=True)
sys.exit(EXIT_CODE)
