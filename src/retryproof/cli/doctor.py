"""`retryproof doctor`: find what breaks a store's safety without an error (O2)."""

from __future__ import annotations

import sys

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.output import Output, add_row, table
from retryproof.core.address import redacted
from retryproof.stores.diagnosis import Verdict, diagnose

STYLES = {Verdict.OK: "", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@json_option
def doctor(url: str, strict: bool, output: Output) -> None:
    """Check for what breaks the safety of the store at URL without an error; each line says what to do.

    It checks eviction, persistence, replicas, durability, isolation, schema, indexes, permissions and clocks, if the
    store has them. It changes nothing. The exit code is 1 if a check FAILs.
    """
    with output.progress(f"looking at {redacted(url)}"):
        findings = diagnose(url)
    shown = table("", "check", "found")
    for finding in findings:
        advice = f" → {finding.advice}" if finding.advice else ""
        verdict = finding.verdict
        add_row(shown, (verdict.upper(), finding.check, finding.says + advice), STYLES[verdict])
    verdicts = [finding.verdict for finding in findings]
    worst = max(verdicts, key=list(Verdict).index)
    document = {
        "store": redacted(url),
        "verdict": worst.value,
        "findings": [
            {"check": it.check, "verdict": it.verdict.value, "says": it.says, "advice": it.advice} for it in findings
        ],
    }
    output.answer(document, redacted(url), shown)
    if worst is Verdict.FAIL or (strict and worst is Verdict.WARN):
        sys.exit(exits.FOUND)
