"""The command line: `scripts/services install|up|down|status|env [name ...]`."""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from servers.install import install
from servers.order import Missing, RunDirectory, Unanswered, answering, plan, resolve
from servers.probes import NoAnswer
from servers.table import SERVICES

DESCRIPTION = """\
Servers for the tests. For each: the environment variable, else the standard port, else a private instance.

  install  get the programs that are missing (Debian packages when root, else wheels)
  up       start what does not answer yet, side by side, and leave it running
  down     stop what `up` started, and nothing else
  status   say what answers, or what would be started
  env      print the environment variables of what answers, for `eval "$(scripts/services env)"`
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 when all went well, 1 when a server is missing or does not answer."""
    parser = argparse.ArgumentParser(
        prog="scripts/services", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("install", "up", "down", "status", "env"))
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SERVICES)}; all by default")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in SERVICES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)} (there are {', '.join(SERVICES)})")
    names = options.names or list(SERVICES)
    match options.command:
        case "install":
            return _each(names, install)
        case "up":
            return _up(names)
        case "down":
            return _down()
        case "status":
            return _each(names, plan)
        case _:
            return _each_environment(names)


def _up(names: list[str]) -> int:
    run = RunDirectory.of_project()
    with ThreadPoolExecutor() as side_by_side:
        started = {name: side_by_side.submit(resolve, name, run) for name in names}
    return _each(names, lambda name: str(started[name].result()))


def _down() -> int:
    for instance in RunDirectory.of_project().clear():
        print(f"{instance.name:9} stopped (pid {instance.pid})")
    return 0


def _each_environment(names: list[str]) -> int:
    for name in names:
        server = answering(name)
        if server is not None:
            print(f"export {SERVICES[name].variable}='{server.url}'")
    return 0


def _each(names: list[str], work: Callable[[str], str]) -> int:
    """Prints a line a server. What is missing fails a named request and CI; else it is only said."""
    failed = False
    for name in names:
        try:
            print(f"{name:9} {work(name)}", flush=True)
        except Missing as error:
            print(f"{name:9} {error}", file=sys.stderr)
            failed = failed or os.environ.get("CI") == "true" or len(names) < len(SERVICES)
        except (Unanswered, NoAnswer, RuntimeError) as error:
            print(f"{name:9} {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
