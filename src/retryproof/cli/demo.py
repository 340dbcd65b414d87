"""`retryproof demo`: charges over a bad network, with killed servers, without the middleware and with it."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from retryproof.cli import exits
from retryproof.cli.command import Usage, json_option
from retryproof.cli.output import Output

NEEDED = ("fastapi", "httpx", "starlette", "uvicorn", "pydantic")


@click.command(epilog=exits.HELP)
@click.option("--charges", type=click.IntRange(1, 100_000), default=None, help="How many charges clients want.")
@click.option("--seed", type=int, default=None, help="Makes the same faults again.")
@json_option
def demo(charges: int | None, seed: int | None, output: Output) -> None:
    """Charge a few hundred times over a link that loses replies, while the server is killed: without the layer, then
    with it. Exits with 1 if a charge was doubled or lost with the layer, or if nothing went wrong without it.
    """
    try:
        runner = import_module("retryproof.demo.runner")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        raise Usage(f"The demo needs {error.name}, which is not installed: pip install 'retryproof[demo]'") from error
    chosen = {name: value for name, value in (("charges", charges), ("seed", seed)) if value is not None}
    failed = runner.run_demo(**chosen, json=output.as_json)
    sys.exit(exits.FOUND if failed else exits.DONE)
