"""The documentation is true: its code runs, its links lead somewhere, and its pages can be read in one sitting."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, SERVERS, anchors, blocks, code_of, links, name_of, pages, program

LONG = {"docs/reference/rules.md", "docs/reference/api.md"}
SECONDS = 50
WITH_CODE = [page for page in pages() if code_of(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_and_runs_again(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    code = code_of(page.read_text())
    environment = dict(os.environ)
    for server in {block.needs for block in code if block.needs}:
        environment[SERVERS[server]] = request.getfixturevalue(f"{server}_url")
    for block in code:
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code)
    (tmp_path / "page.py").write_text(program(code))
    for turn in ("first", "second"):  # a reader runs it again, over the files and servers that the first run left
        status, said = run_alone([sys.executable, "-W", "error", "page.py"], tmp_path, environment)
        assert status == 0, f"{name_of(page)}, run for the {turn} time, by its own lines:\n{said}"


def run_alone(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The status of a program and what it said; whatever it started ends with it."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = f"{process.communicate()[0]}\nIt ran for more than {SECONDS} s."
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(link)
    assert broken == []


def test_the_links_of_the_readme_hold_on_a_package_index() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = project["urls"]["Documentation"]
    found = links((ROOT / "README.md").read_text())
    assert found
    assert [link for link in found if not link.startswith(site)] == []
    broken = []
    for link in found:
        target, _, anchor = link.removeprefix(site).partition("#")
        file = (ROOT / "docs" / target).with_suffix(".md")
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(link)
    assert broken == []


def test_every_reference_of_the_readme_is_defined_and_used() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\]\[([^\]\n]+)\]", text)) == set(re.findall(r"^\[([^\]\n]+)\]: ", text, re.MULTILINE))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_can_be_read_in_one_go(page: Path) -> None:
    assert name_of(page) in LONG or len(page.read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/explain/pitfalls/[!i]*.md")), ids=lambda page: page.stem)
def test_a_pitfall_is_short_shows_its_fault_and_names_its_rule(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) < 80
    assert code_of(text)
    assert [link for link in links(text) if "reference/rules.md#" in link]
    assert f"]({page.name})" in page.with_name("index.md").read_text()


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    reached, ahead = {index}, [index]
    while ahead:
        page = ahead.pop()
        near = {
            (page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text()) if "://" not in link
        }
        new = {found for found in near if found.suffix == ".md" and found.is_file()} - reached
        reached |= new
        ahead += new
    assert {name_of(page) for page in ROOT.glob("docs/**/*.md")} - {name_of(page) for page in reached} == set()


def test_the_map_for_contributors_names_what_is_there() -> None:
    """Folders that stand first on a line of the map, and files; those indented are in the folder above."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = next(block.code for block in blocks(text) if block.code.startswith("src/retryproof/")).splitlines()
    named, folder = [], ROOT
    for line in lines:
        entry = line.split()[0]
        if line.startswith(" "):
            named.append(folder / entry)
        else:
            folder = ROOT / entry
            named.append(folder)
    assert len(named) > 20
    assert [name_of(path) for path in named if not path.exists()] == []


def test_a_marker_says_what_a_block_needs_or_why_it_is_not_run() -> None:
    text = "<!-- test: needs redis -->\n```python\na\n```\n<!-- test: skip no such server -->\n```python\nb\n```\n"
    assert [(block.needs, block.skipped) for block in blocks(text)] == [("redis", None), (None, "no such server")]
    assert [block.code for block in code_of(text)] == ["a\n"]


@pytest.mark.parametrize("marker", ["skip", "needs oracle", "later"])
def test_a_marker_that_says_nothing_known_is_refused(marker: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        blocks(f"<!-- test: {marker} -->\n```python\n```\n")


def test_lines_of_the_program_are_those_of_the_page() -> None:
    text = "# A page\n\n```python\na = 1\n```\n\n1. A list\n   ```python\n   b = 2\n   ```\n"
    lines = program(code_of(text)).splitlines()
    assert [(number, line) for number, line in enumerate(lines, 1) if line] == [(4, "a = 1"), (9, "b = 2")]
