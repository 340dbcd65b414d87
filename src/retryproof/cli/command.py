"""What all commands share: the store's URL, `--json`, and errors as messages and exit codes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from retryproof.cli import exits
from retryproof.cli.output import Output, json_text, printable
from retryproof.core.address import scrubbed
from retryproof.core.errors import ConfigurationError, IdempotencyError, StoreUnavailable, Unreadable
from retryproof.sql.postgres.url import NoDatabase
from retryproof.stores import Store, open_store

STORE_VARIABLE = "RETRYPROOF_STORE"
Function = Callable[..., Any]


class Refused(click.ClickException):
    """The object does not exist, or the action is refused: exit code 1."""

    exit_code = exits.FOUND


class Usage(click.ClickException):
    """Wrong usage: exit code 2."""

    exit_code = exits.USAGE


class NoAnswer(click.ClickException):
    """The store gave no answer: exit code 3."""

    kind = "unreachable"
    exit_code = exits.UNREACHABLE


def json_option(function: Function) -> Function:
    """Add `--json`, which the function gets as an Output, and turn errors into messages with an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document, errors included.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, **options: Any) -> Any:
        output = Output(as_json)
        try:
            with messages(secret_url=_url_of(options)):
                return function(*args, output=output, **options)
        except KeyboardInterrupt:  # click would make it exit code 1
            output.note("Interrupted.")
            sys.exit(exits.INTERRUPTED)
        except click.ClickException as error:
            if not as_json:
                raise
            kind = getattr(error, "kind", type(error).__name__.lower())
            click.echo(json_text({"error": {"kind": kind, "message": error.format_message()}}, indent=None))
            sys.exit(error.exit_code)

    return wrapped


def split_targets(targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """URLs, and the names of what is meant."""
    return [target for target in targets if "://" in target], [target for target in targets if "://" not in target]


def _url_of(options: dict[str, Any]) -> str:
    targets = (options.get("url"), *options.get("targets", ()))
    return next((target for target in targets if target and "://" in target), "")


@contextmanager
def messages(*, secret_url: str) -> Iterator[None]:
    """Turn the library's errors into those of the command line, without the URL's password."""

    def said(error: Exception) -> str:
        return printable(scrubbed(str(error), secret_url))

    try:
        yield
    except (ConfigurationError, NoDatabase) as error:
        raise Usage(said(error)) from error
    except StoreUnavailable as error:
        raise NoAnswer(said(error)) from error
    except Unreadable as error:
        raise Refused(said(error)) from error
    except IdempotencyError as error:
        raise Refused(said(error)) from error


def url_argument(function: Function) -> Function:
    """The store's URL, from an argument or the environment."""
    return click.argument("url", metavar="[URL]", required=False, envvar=STORE_VARIABLE, callback=_required_url)(
        function
    )


def _required_url(context: click.Context, parameter: click.Parameter, url: str | None) -> str:
    url = url or no_url()
    _find_settings(url)
    return url


def _find_settings(url: str) -> None:
    if url.startswith("django:"):
        find_modules_here()  # as under manage.py


def no_url() -> NoReturn:
    """Raise UsageError, since the store's URL is missing."""
    raise click.UsageError(f"Give the store's URL, such as sqlite:///keys.db, or set {STORE_VARIABLE}.")


@contextmanager
def opened(url: str, timeout: float = 5.0) -> Iterator[Store]:
    """Open the store of a URL, and close it at the end."""
    _find_settings(url)
    store = open_store(url, timeout=timeout)
    try:
        yield store
    finally:
        store.close()


def find_modules_here() -> None:
    """Let MODULE:OBJECT name modules of the current directory, as with `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
