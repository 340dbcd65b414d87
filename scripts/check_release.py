"""Checks that the package's version is the changelog's newest, and that the changelog is in order."""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d{2}-\d{2})$")


def main() -> int:
    """0 when they agree; otherwise 1, and says what to change."""
    source = (PROJECT / "src/retryproof/__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    headings = [line for line in (PROJECT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    releases = [match for line in headings if (match := HEADING.match(line))]
    problems = [f"CHANGELOG.md: {line!r} is not '## [x.y.z] - date'" for line in headings if not HEADING.match(line)]
    if found is None:
        problems.append("src/retryproof/__init__.py has no __version__")
    elif not releases or releases[0][1] != found[1]:
        newest = releases[0][1] if releases else "nothing"
        problems.append(f"the version is {found[1]}, but the changelog's newest entry is {newest}")
    problems += [
        f"CHANGELOG.md: {later[1]} is unreleased below a newer entry"
        for later in releases[1:]
        if later[2] == "unreleased"
    ]
    print("\n".join(problems) or f"version and changelog agree: {releases[0][1]}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
