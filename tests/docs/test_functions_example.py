"""The functions example: a worker whose jobs take effect once."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from tests.docs.pages import ROOT

WORKER = ROOT / "examples" / "functions" / "worker.py"


def run_worker(folder: Path, *jobs: dict[str, object]) -> list[str]:
    """What the worker says of these jobs."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    command = [sys.executable, str(WORKER), "jobs.jsonl"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return run.stdout.splitlines()


def payouts(folder: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(folder / "payouts.db")) as books:
        return books.execute("SELECT receiver, amount FROM payouts").fetchall()


def test_a_job_that_comes_twice_is_paid_once_as_its_readme_shows(tmp_path: Path) -> None:
    job: dict[str, object] = {"id": "job-1", "to": "ada", "amount": 10}
    replayed = "job-1  replayed  {'to': 'ada', 'paid': 10}"
    assert run_worker(tmp_path, job, job) == ["job-1  paid      {'to': 'ada', 'paid': 10}", replayed]
    assert run_worker(tmp_path, job, job) == [replayed, replayed]
    assert payouts(tmp_path) == [("ada", 10)]


def test_another_job_under_a_used_id_is_refused(tmp_path: Path) -> None:
    job: dict[str, object] = {"id": "job-1", "to": "ada", "amount": 10}
    assert run_worker(tmp_path, job, {**job, "amount": 99})[1] == "job-1  refused   this id was used for another job"
    assert payouts(tmp_path) == [("ada", 10)]
