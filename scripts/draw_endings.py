"""Draws how a request ends from the HTTP layer's own table, as a table in Markdown; `--write` puts it into the page.

.venv/bin/python scripts/draw_endings.py
"""

import re
import sys
from pathlib import Path

from retryproof.http.ending import ANSWERS, ROWS, WORKS, Row
from retryproof.http.recorder import REACHES

PAGE = Path(__file__).parents[1] / "docs" / "explain" / "endings.md"
_TABLE = re.compile(r"(<!-- drawn from the table -->\n).*?(<!-- until here -->)", re.DOTALL)
HEAD = (
    "| what happened | how far the response was | work | the record gets | sent | where the client has left |\n"
    "|---|---|---|---|---|---|\n"
)


def drawn_table() -> str:
    """One line for each row of the table."""
    return HEAD + "".join(_line(row) for row in ROWS)


def _line(row: Row) -> str:
    record, there, left = row.ending
    happened = "answered, whatever it is" if row.happened == ANSWERS else ", ".join(row.happened)
    reach = "anywhere" if set(row.reach) == set(REACHES) else ", ".join(row.reach)
    work = "either" if row.work == WORKS else ", ".join(row.work)
    return f"| {happened} | {reach} | {work} | {record} | {there} | {'the same' if left == there else left} |\n"


def drawn(page: str) -> str:
    """The page with the table as it should be; ValueError where it has no place for one."""
    text, places = _TABLE.subn(lambda found: found[1] + drawn_table() + found[2], page)
    if places != 1:
        raise ValueError(f"{PAGE.name} has {places} places for the table, not one")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(drawn(PAGE.read_text()))
    else:
        sys.stdout.write(drawn_table())
