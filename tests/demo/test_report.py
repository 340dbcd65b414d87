"""What the demo counts, and what it says about it."""

import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from retryproof.demo import clients, process, report

GOOD = report.Figures(
    wanted=10, made=10, twice=0, lost=0, sent=30, replayed=4, kills=3, kills_after=1, faults=9, seconds=2.0
)
DOUBLED = replace(GOOD, made=13, twice=2)


def test_figures_count_doubled_lost_and_false_receipts_in_the_ledger(tmp_path: Path) -> None:
    database = tmp_path / "payments.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE charges (id TEXT, order_number TEXT)")
        connection.executemany("INSERT INTO charges VALUES (?, ?)", [("a", "1"), ("b", "1"), ("c", "2"), ("d", "3")])
        connection.commit()
    wanted = [clients.Order(number, "ada", 100) for number in ("1", "2", "3", "4")]
    traffic = clients.Traffic(sent=9, replayed=2, receipts={"1": "a", "2": "c", "3": "x"})
    kills: Counter[process.Moment] = Counter({"after": 1, "any": 2})
    figures = report.count(database, wanted, traffic, kills, faults=5, seconds=1.23)
    assert figures == report.Figures(
        wanted=4, made=4, twice=1, lost=2, sent=9, replayed=2, kills=3, kills_after=1, faults=5, seconds=1.2
    )
    assert figures.harmed


def test_a_missing_extra_is_named() -> None:
    program = "import sys; sys.modules['uvicorn'] = None; import retryproof.demo"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: The demo needs uvicorn: pip install 'retryproof[demo]'"
    )


@pytest.mark.parametrize(
    ("without", "layered", "said"),
    [
        (DOUBLED, GOOD, "2 of 10 orders were charged more than once; with it, each of the 10 exactly once"),
        (GOOD, GOOD, "proves nothing"),
        (DOUBLED, DOUBLED, "2 orders were charged twice and 0 lost"),
        (DOUBLED, replace(GOOD, made=9, lost=1), "0 orders were charged twice and 1 lost"),
    ],
    ids=["good", "nothing-proved", "doubled", "lost"],
)
def test_the_sentence_says_what_the_figures_mean(without: report.Figures, layered: report.Figures, said: str) -> None:
    assert said in report.verdict(without, layered)


@pytest.mark.parametrize("charges", [1, 60, 300])
def test_the_plan_of_kills_has_every_moment_and_begins_between_charge_and_answer(charges: int) -> None:
    plan = process.deaths(Random(1), charges)
    assert {death.moment for death in plan} == {"after", "before", "within", "any"}
    assert plan[0].moment == "after"
    assert plan == process.deaths(Random(1), charges)
