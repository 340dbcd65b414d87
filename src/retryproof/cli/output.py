"""What commands print: tables and lines for people, one JSON document for programs, progress to standard error."""

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
"""Called with how far the work is."""


PIPED_WIDTH = 200
"""Columns where there is no terminal: a log or a grep, which wants one line a row."""


class Output:
    """Where a command's answer goes; `as_json` makes it one document on standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(soft_wrap=True, highlight=False, markup=False)
        if not self._out.is_terminal:
            self._out.width = PIPED_WIDTH
        self._err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def answer(self, document: object, *lines: str | Table) -> None:
        """The answer, in both forms."""
        if self.as_json:
            click.echo(json_text(document))
            return
        for line in lines:
            self._out.print(printable(line) if isinstance(line, str) else line)

    def note(self, line: str) -> None:
        """A remark for people, beside the answer."""
        self._err.print(printable(line))

    @contextmanager
    def progress(self, text: str) -> Iterator[Tell]:
        """A line on standard error that says how far the work is; nothing where nobody looks."""
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
    """A plain table; what identifies a row comes first, and is never cut off."""
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
    """A row of plain text: what a store holds is never taken for markup."""
    to.add_row(*(Text(printable(str(cell)).replace("\n", "\N{REPLACEMENT CHARACTER}")) for cell in cells), style=style)


def printable(text: str) -> str:
    """Without control characters (C0, C1, those that change the direction), which a terminal would obey."""
    return "".join(_shown(character, "\N{REPLACEMENT CHARACTER}") for character in text)


def json_text(document: object, indent: int | None = 2) -> str:
    """A document on one terminal or in one program: text stays text, and control characters are escaped."""
    written = json.dumps(document, ensure_ascii=False, indent=indent, default=str)
    return "".join(_shown(character, json.dumps(character)[1:-1]) for character in written)


def _shown(character: str, instead: str) -> str:
    return character if character == "\n" or character.isprintable() else instead


def duration(seconds: float) -> str:
    """Seconds as people say them: 1.5 s, 3 min, 2 h, 5 d."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
