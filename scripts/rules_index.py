"""Which tests hold which rule, found by the rules' numbers in the tests; `--write` puts the lists into the page.

    .venv/bin/python scripts/rules_index.py          # each rule, and how many tests name it
    .venv/bin/python scripts/rules_index.py C3 H9    # the tests of these rules, by name
    .venv/bin/python scripts/rules_index.py --write  # after adding tests: update docs/reference/rules.md

A test names a rule in its own name (`test_c3_…`), in its docstring, a comment or a decorator; a class that names one in
its docstring does so for all of its tests.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "rules.md"
SUITE = ROOT / "src" / "retryproof" / "testing" / "cases.py"
"""The cases of the public suite, which runs over every store."""

_NUMBER = re.compile(r"\b([CHKOTFM]\d{1,2})\b(?: to ([CHKOTFM]\d{1,2})\b)?")
_IN_NAME = re.compile(r"(?:^|_)([chkotfm]\d{1,2})(?=_|$)")
_SECTION = re.compile(r"^### (?P<rule>[CHKOTFM]\d{1,2}) (?P<title>.+)\n(?P<text>(?:(?!^#).*\n?)*)", re.MULTILINE)
_HELD = re.compile(r"^Held by: .*\n(?:(?!\n).+\n)*", re.MULTILINE)
_FILES = re.compile(r"`((?:tests|src)/[\w/]+\.py)`")
_ELSEWHERE = "Not in this release"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, order=True)
class Test:
    """A test, or a case of the suite."""

    file: str
    name: str


def rules(page: str) -> dict[str, bool]:
    """Every rule on the page, in order, and whether it is in this release."""
    return {match["rule"]: not match["text"].lstrip().startswith(_ELSEWHERE) for match in _SECTION.finditer(page)}


def index() -> dict[str, list[Test]]:
    """The tests of each rule that any test names."""
    found: dict[str, set[Test]] = {}
    for file in sorted(ROOT.glob("tests/**/test_*.py")):
        if "docs" not in file.relative_to(ROOT).parts:
            _read(file, "test_", found)
    _read(SUITE, "", found)
    return {rule: sorted(tests) for rule, tests in found.items()}


def _read(file: Path, prefix: str, found: dict[str, set[Test]]) -> None:
    source = file.read_text()
    module = ast.parse(source)
    for function, context in _functions(module):
        if function.name.startswith(prefix):
            test = Test(file.relative_to(ROOT).as_posix(), function.name)
            for rule in _named(function.name, f"{context}\n{_text(source, function)}"):
                found.setdefault(rule, set()).add(test)


def _functions(scope: ast.Module | ast.ClassDef, context: str = "") -> Iterator[tuple[Function, str]]:
    """The functions of a module and its classes, each with the docstrings of the classes around it."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{context}\n{ast.get_docstring(node) or ''}")
        elif isinstance(node, Function):
            yield node, context


def _text(source: str, function: Function) -> str:
    """The function as it is written, decorators and comments included."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : function.end_lineno])


def _named(name: str, text: str) -> set[str]:
    named = {rule.upper() for rule in _IN_NAME.findall(name)}
    for first, last in _NUMBER.findall(text):
        if last and last[0] == first[0]:
            named |= {f"{first[0]}{number}" for number in range(int(first[1:]), int(last[1:]) + 1)}
        else:
            named |= {rule for rule in (first, last) if rule}
    return named


def updated(page: str) -> str:
    """The page with the files that hold each rule."""
    tests = index()

    def section(match: re.Match[str]) -> str:
        text = _HELD.sub("", match["text"]).strip()
        files = sorted({test.file for test in tests.get(match["rule"], [])})
        held = f"\n\nHeld by: {', '.join(f'`{file}`' for file in files)}" if files else ""
        return f"### {match['rule']} {match['title']}\n{text}{held}\n\n"

    return _SECTION.sub(section, page).rstrip() + "\n"


def listed(page: str) -> dict[str, set[str]]:
    """The files that the page lists for each rule."""
    return {match["rule"]: set(_FILES.findall(match["text"])) for match in _SECTION.finditer(page)}


def unheld(page: str) -> list[str]:
    """The rules of this release that no test names."""
    tests = index()
    return [rule for rule, released in rules(page).items() if released and rule not in tests]


def main(arguments: list[str]) -> int:
    """Print or write what was asked for; 1 when a rule of this release has no test."""
    if arguments == ["--write"]:
        PAGE.write_text(updated(PAGE.read_text()))
        return 0
    tests, page = index(), PAGE.read_text()
    for rule in arguments:
        print("\n".join([rule, *(f"  {test.file}::{test.name}" for test in tests.get(rule, []))]))
    if arguments:
        return 0
    for rule, released in rules(page).items():
        print(f"{rule:4} {len(tests.get(rule, [])):3} tests" if released else f"{rule:4} not in this release")
    missing = unheld(page)
    if missing:
        print(f"no test names {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
