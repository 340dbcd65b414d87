"""`python -m retryproof.demo`."""

import argparse
import sys
from pathlib import Path

from retryproof.demo.runner import run_demo


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m retryproof.demo", description="Charges that survive kill -9.")
    parser.add_argument("--charges", type=int, default=300, help="how many charges the clients want")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the clients of each half may take")
    parser.add_argument("--seed", type=int, help="draw the same orders, faults and kills again")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, the rest to stderr")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave the ledgers there, to look at")
    options = parser.parse_args()
    try:
        return run_demo(
            charges=options.charges, seconds=options.seconds, seed=options.seed, json=options.json, files=options.keep
        )
    except KeyboardInterrupt:
        return 130  # the exit code of shells


if __name__ == "__main__":
    sys.exit(main())
