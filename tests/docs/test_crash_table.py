"""The crash tables of docs/explain/exactly-once.md: each row names points at which a test kills a process."""

import re

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "explain" / "exactly-once.md").read_text()
CALLS, CASES = "tests/transaction/test_call_kills.py", "src/retryproof/testing/cases.py"
HELD_BY = {
    "plain": ["tests/crash/test_kill_nine.py", CALLS, CASES],
    "transactional": ["tests/transaction/test_http_kills.py", CALLS, CASES],
    "phases": ["tests/transaction/test_rides_crash.py", CALLS],
    "the message": ["tests/transaction/test_message_kills.py"],
}
Table = dict[str, dict[str, str]]


def tables(page: str) -> list[Table]:
    """Those whose first column says where something is killed: rows by what that says, cells by their column."""
    found = []
    for table in re.findall(r"^\| killed .*\n(?:\|.*\n)+", page, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows})
    return found


SAID, SAID_OF_MESSAGES, SHOWN, SHOWN_OF_MESSAGES = tables(PAGE)


@pytest.mark.parametrize(("said", "shown"), [(SAID, SHOWN), (SAID_OF_MESSAGES, SHOWN_OF_MESSAGES)])
def test_each_row_of_a_crash_table_names_where_it_is_shown(said: Table, shown: Table) -> None:
    assert list(shown) == list(said)
    for row, cells in said.items():
        assert list(shown[row]) == list(cells)
        for column, cell in cells.items():
            assert cell.startswith("–") == (shown[row][column] == "–"), (row, column)


def test_each_point_that_is_named_is_one_of_a_test() -> None:
    for table in (SHOWN, SHOWN_OF_MESSAGES):
        for row, cells in table.items():
            for column, cell in cells.items():
                sources = "".join((ROOT / file).read_text() for file in HELD_BY[column])
                for point in re.findall(r"`(.+?)`", cell):
                    assert is_in(point, sources), (row, column, point)


def is_in(point: str, sources: str) -> bool:
    """Whether the tests have this point: spelled out, or put together as those of the rides are."""
    when, _, what = point.partition(" ")
    together = 'f"{when} {what}"' in sources and f'"{when}"' in sources and f'"{what}"' in sources
    return f'"{point}"' in sources or f"{point}(" in sources or together


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"`((?:tests|src)/[\w/]+\.py)`", PAGE)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert {file for files in HELD_BY.values() for file in files} <= set(named)
