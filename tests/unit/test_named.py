"""Statements whose parameters have names."""

from __future__ import annotations

from retryproof.sql.named import dollars, marks

SQL = "UPDATE t SET a = :a::bytea[], n = f()::bigint, b = :b::text WHERE a <> :a::bytea[]"


def test_dollars_number_each_name_once_and_keep_types() -> None:
    statement = dollars(SQL)(b="two", a="one")
    assert statement.sql == "UPDATE t SET a = $1::bytea[], n = f()::bigint, b = $2::text WHERE a <> $1::bytea[]"
    assert statement.parameters == ["one", "two"]


def test_marks_repeat_values_and_drop_types() -> None:
    statement = marks("SELECT :a::bytea, :b, :a")(a=1, b=2)
    assert (statement.sql, statement.parameters) == ("SELECT ?, ?, ?", [1, 2, 1])
