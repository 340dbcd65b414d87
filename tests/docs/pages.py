"""The documentation as it lies in the repository: its pages, their code and their links.

A page's Python blocks are one program: they share a namespace, in order, and lines keep their numbers. An HTML comment
on the line before a block says what is special about it:

    <!-- test: needs redis -->        the program finds the server's URL in RETRYPROOF_TEST_REDIS_URL; also `postgres`,
                                      `mariadb`, `dynamodb`
    <!-- test: skip why -->           it is not run; the reason is part of the marker

A block whose first line is `# name.py` is also written to that file, beside the program.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVERS = {
    "redis": "RETRYPROOF_TEST_REDIS_URL",
    "postgres": "RETRYPROOF_TEST_POSTGRES_URL",
    "mariadb": "RETRYPROOF_TEST_MARIADB_URL",
    "dynamodb": "RETRYPROOF_TEST_DYNAMODB_URL",
}

_FENCE = re.compile(
    r"(?:^[ ]*<!-- test: (?P<marker>.*?) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_FILE = re.compile(r"# (\w+\.py)\n")
_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_DEFINITION = re.compile(r"^\[[^\]\n]+\]: (\S+)$", re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_MARKER = re.compile(r"^[ ]*<!-- test: ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `line` is that of its first line of code, counted from 1."""

    language: str
    code: str
    line: int
    needs: str | None = None
    skipped: str | None = None

    @property
    def file(self) -> str | None:
        """The file that the block stands for, if it names one."""
        named = _FILE.match(self.code)
        return named[1] if named else None


def pages() -> list[Path]:
    """Every page that a user or a contributor reads."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*/README.md")]
    return sorted([*found, ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/**/*.md")])


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page; ValueError for a marker that says nothing known, or that no block follows."""
    found = []
    for match in _FENCE.finditer(text):
        needs, skipped = _read_marker(match["marker"] or "")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], textwrap.dedent(match["code"]), line, needs, skipped))
    if len(_MARKER.findall(text)) != sum(bool(block.needs or block.skipped) for block in found):
        raise ValueError("a test marker stands before no block")
    return found


def _read_marker(marker: str) -> tuple[str | None, str | None]:
    word, _, rest = marker.partition(" ")
    if word == "needs" and rest in SERVERS:
        return rest, None
    if word == "skip" and rest:
        return None, rest
    if marker:
        raise ValueError(f"unknown test marker: {marker!r}")
    return None, None


def code_of(text: str) -> list[Block]:
    """The Python blocks that are run."""
    return [block for block in blocks(text) if block.language in ("python", "py") and block.skipped is None]


def program(code: list[Block]) -> str:
    """One program of all blocks, each on the lines that it has in the page."""
    lines: list[str] = []
    for block in code:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def links(text: str) -> list[str]:
    """The targets of a page's links, without those in code."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    return _LINK.findall(prose) + _DEFINITION.findall(prose)


def anchors(text: str) -> set[str]:
    """What a link may name after `#`: each heading, as GitHub and MkDocs spell it."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
