"""Let a compose run work for hours under faults, check what it left behind, and write docs/reliability.md.

    make reliability                                          # 25 minutes or more, with pauses of 18 s between faults
    make reliability ARGS="--hours 3 --fault-every-s 120"     # the full length

It needs a Docker engine and the images of `TANDEM_GENERATOR_TARGET=mock docker compose build`. It ends with exit
status 0 if everything held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.faults import FAULTS
from support.reliability_report import problems, report, timeline
from support.stack import ROOT
from support.unattended import Unattended

STEP_S = 0.4
"""What a step takes with the default latency. Only the length of the run depends on it."""
PAGE = ROOT / "docs/reliability.md"


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Unattended(
            folder,
            steps=args.steps or round(args.hours * 3600 / STEP_S),
            seed=args.seed,
            every_s=args.fault_every_s,
            lasts_s=min(60.0, args.fault_every_s / 2),
            latency_s=args.latency_s,
            kinds=args.faults,
        )
        run.run()
        found = problems(run)
        print(*timeline(run), *(found or ["everything held"]), sep="\n")
        if not args.no_page:
            PAGE.write_text(report(run, found, command=shown(sys.argv[1:])))
    return 1 if found else 0


def shown(arguments: Sequence[str]) -> str:
    """The arguments that someone else needs to repeat this run: all but --keep."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return " ".join(word for before, word in pairs if "--keep" not in (before, word))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=25 / 60, help="how long the run takes without faults")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --hours")
    parser.add_argument("--fault-every-s", type=float, default=18.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency-s", type=float, default=0.5, help="time that the mock takes for a group")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--keep", type=Path, help="folder that keeps the logs and the run's files")
    parser.add_argument("--no-page", action="store_true", help="do not write docs/reliability.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
