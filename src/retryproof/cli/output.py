"""The output of commands: tables and lines for people, one JSON document for programs, progress on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Tell = Callable[[str], None]
"""Called with the progress of the work."""


PIPED_WIDTH = 200
"""Columns without a terminal: in a log, or for grep, each row has to be one line."""


class Output:
    """The output of a command; with `as_json` it is one document on standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(soft_wrap=True, highlight=False, markup=False)
        if not self._out.is_terminal:
            self._out.width = PIPED_WIDTH
        self._err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def answer(self, document: object, *lines: str | Table) -> None:
        """Print the answer, as JSON or for people."""
        if self.as_json:
            click.echo(json_text(document))
            return
        for line in lines:
            self._out.print(printable(line) if isinstance(line, str) else line)

    def note(self, line: str) -> None:
        """Print a remark for people."""
        self._err.print(printable(line))

    @contextmanager
    def progress(self, text: str) -> Iterator[Tell]:
        """A line on standard error that shows the progress; nothing without a terminal."""
        if not self._err.is_terminal:
            yield lambda line: None
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task(text, total=None)

            def tell(line: str) -> None:
                bar.update(task, description=printable(f"{text}: {line}"))

            yield tell


def table(*headings: str) -> Table:
    """A plain table; the first column identifies a row, and is never cut off."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings):
        made.add_column(heading, no_wrap=place == 0, overflow="fold")
    return made


def facts(*rows: tuple[str, object]) -> Table:
    """A table of names and values."""
    made = table("", "")
    made.show_header = False
    for row in rows:
        add_row(made, row)
    return made


def add_row(to: Table, cells: Sequence[Any], style: str = "") -> None:
    """A row of plain text: content of a store is never read as markup."""
    to.add_row(*(Text(printable(str(cell)).replace("\n", "\N{REPLACEMENT CHARACTER}")) for cell in cells), style=style)


def printable(text: str) -> str:
    """The text without control characters (C0, C1, changes of direction), which a terminal would execute."""
    return "".join(_shown(character, "\N{REPLACEMENT CHARACTER}") for character in text)


def json_text(document: object, indent: int | None = 2) -> str:
    """A JSON document in which control characters are escaped, safe for terminals and programs."""
    written = json.dumps(document, ensure_ascii=False, indent=indent, default=str)
    return "".join(_shown(character, json.dumps(character)[1:-1]) for character in written)


def _shown(character: str, instead: str) -> str:
    return character if character == "\n" or character.isprintable() else instead


def duration(seconds: float) -> str:
    """Seconds for people: 1.5 s, 3 min, 2 h, 5 d."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
