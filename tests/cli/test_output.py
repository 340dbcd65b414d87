"""What a terminal would obey reaches none."""

from __future__ import annotations

import json

import pytest

from retryproof.cli.output import Output, add_row, json_text, printable, table

HOSTILE = "a\x1b[2J\x9b31m\x85\u202eb\x00\ud800\x7f"
"""C0 and C1 control characters, a change of direction, half a character."""


def test_o1_text_has_no_control_characters() -> None:
    assert printable(HOSTILE) == "a�[2J�31m��b���"


def test_o1_json_keeps_control_characters_as_escapes() -> None:
    document = {"trace": HOSTILE, "name": "Ada Lovelace, ada@é.example ☂"}
    written = json_text(document)
    assert json.loads(written) == document
    assert written.replace("\n", "").isprintable()
    assert "☂" in written


@pytest.mark.parametrize("as_json", [True, False])
def test_o1_no_form_of_an_answer_lets_them_through(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    rows = table("trace")
    add_row(rows, [HOSTILE])
    output = Output(as_json)
    output.answer({"trace": HOSTILE}, HOSTILE, rows)
    output.note(HOSTILE)
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
