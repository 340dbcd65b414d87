"""The reference is made from the code, and says what the code does."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import api_reference
import draw_endings
import draw_protocol
import rules_index
from retryproof import Policy, transaction
from retryproof.core.flow import TABLE
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.problem import DOCS_URL, KINDS, Problem, render
from retryproof.stores.url import SCHEMES
from tests.docs.pages import ROOT, anchors, blocks
from tests.packaging.names import NAMES

DOCS = ROOT / "docs"
PROBLEMS = DOCS / "reference" / "problems.md"
POLICY = DOCS / "reference" / "policy.md"


def test_the_protocols_diagram_is_drawn_from_the_table() -> None:
    page = (DOCS / "explain" / "protocol.md").read_text()
    assert draw_protocol.drawn(page) == page, "run scripts/draw_protocol.py --write"


def test_the_endings_of_requests_are_drawn_from_the_table() -> None:
    page = draw_endings.PAGE.read_text()
    assert draw_endings.drawn(page) == page, "run scripts/draw_endings.py --write"


def test_the_diagram_has_every_way_that_the_table_has() -> None:
    arrows = re.findall(r"(\w+) --> (\w+): (.+)", draw_protocol.diagram())
    drawn = {(state, reply, target) for state, target, replies in arrows for reply in replies.split(", ")}
    assert drawn == {(state, reply, target) for (state, reply), targets in TABLE.items() for target in targets}


def test_the_protocol_page_explains_every_conclusion() -> None:
    states = {state for state, _ in TABLE}
    conclusions = {target for targets in TABLE.values() for target in targets} - states
    rows = re.findall(r"^\| (\w+) \|", (DOCS / "explain" / "protocol.md").read_text(), re.MULTILINE)
    assert conclusions - set(rows) == set()


def test_the_reference_is_made_from_the_docstrings() -> None:
    committed = api_reference.PAGE.read_text()
    assert api_reference.reference() == committed, "run scripts/api_reference.py --write"


def test_the_reference_has_every_public_name() -> None:
    listed = {(module, name) for module, names in api_reference.SECTIONS.values() for name in names}
    wanted = {(module, name) for module, names in NAMES.items() for name in names} - {("retryproof", "errors")}
    wanted |= {("retryproof.transaction", name) for name in transaction.__all__}
    assert wanted - listed == set()


def test_the_rules_page_lists_files_that_name_the_rule_and_at_least_one() -> None:
    """A file that names a rule since the page was written may be missing: `make docs` adds it."""
    tests, listed = rules_index.index(), rules_index.listed(rules_index.PAGE.read_text())
    stale = {rule: files - {test.file for test in tests.get(rule, [])} for rule, files in listed.items()}
    assert {rule: files for rule, files in stale.items() if files} == {}, "run scripts/rules_index.py --write"
    assert [rule for rule in tests if not listed[rule]] == [], "run scripts/rules_index.py --write"


def test_every_rule_of_this_release_is_named_by_a_test() -> None:
    assert rules_index.unheld(rules_index.PAGE.read_text()) == []


def test_the_rules_of_this_release_are_all_there() -> None:
    rules = rules_index.rules(rules_index.PAGE.read_text())
    wanted = (
        [f"C{n}" for n in range(1, 22)] + [f"H{n}" for n in range(1, 16)] + ["K1", "K2", "K3", "O1", "O2", "O3", "O4"]
    )
    assert [rule for rule in wanted if not rules.get(rule)] == []


def test_no_test_names_a_rule_that_is_not_on_the_page() -> None:
    assert set(rules_index.index()) - set(rules_index.rules(rules_index.PAGE.read_text())) == set()


@pytest.mark.parametrize("code", KINDS)
def test_a_problem_has_a_section_where_its_type_leads(code: str) -> None:
    text = PROBLEMS.read_text()
    assert code in anchors(text)
    assert re.search(rf"^## {code}\nStatus {KINDS[code].status}\b", text, re.MULTILINE)
    assert re.search(rf"^\| \[`{code}`\]\(#{code}\) \| {KINDS[code].status} \|", text, re.MULTILINE)


def test_the_problems_page_shows_a_problem_as_it_is_sent() -> None:
    shown = next(json.loads(block.code) for block in blocks(PROBLEMS.read_text()) if block.language == "json")
    problem = Problem(KINDS[shown["code"]], shown["detail"], operation=shown["operation"])
    assert json.loads(render(problem, DOCS_URL)[2]) == shown


def test_the_policy_page_has_every_option_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", POLICY.read_text(), re.MULTILINE))
    assert {name: rows.get(name) for name in _defaults()} == _defaults()


def _defaults() -> dict[str, str]:
    return {field.name: repr(field.default).replace("'", '"') for field in fields(Policy)}


def test_the_policy_page_has_every_option_of_the_layer() -> None:
    options = set(IdempotencyMiddleware.__init__.__kwdefaults__ or {}) | {"store"}
    assert options - set(re.findall(r"^\| `(\w+)` \|", POLICY.read_text(), re.MULTILINE)) == set()


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=["README"])
def test_a_list_of_stores_names_schemes_that_exist(page: Path) -> None:
    named = set(re.findall(r"`([a-z+]+)://", page.read_text()))
    assert named - set(SCHEMES) == set()
