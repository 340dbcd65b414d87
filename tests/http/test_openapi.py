"""H15: one call adds header, answers and retention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from fastapi import FastAPI

from retryproof.core.errors import ConfigurationError
from retryproof.http.openapi import document_idempotency


def make_document() -> dict[str, Any]:
    app = FastAPI()

    @app.post("/charges", status_code=201)
    def charge(body: dict[str, int]) -> None: ...

    @app.get("/charges")
    def charges() -> None: ...

    return app.openapi()


def test_h15_adds_header_answers_and_retention() -> None:
    document = document_idempotency(make_document(), required=True, retention=172_800)
    operation = document["paths"]["/charges"]["post"]
    [parameter] = operation["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("Idempotency-Key", "header", True)
    assert "2 days" in parameter["description"]
    assert set(operation["responses"]) == {"201", "400", "409", "413", "422", "503"}
    assert "Idempotency-Replayed" in operation["responses"]["201"]["headers"]
    assert "Retry-After" in operation["responses"]["409"]["headers"]
    assert "application/problem+json" in operation["responses"]["409"]["content"]
    assert "IdempotencyProblem" in document["components"]["schemas"]


def test_h15_keeps_the_apps_own_answers_beside_its_own() -> None:
    before = make_document()["paths"]["/charges"]["post"]["responses"]["422"]
    after = document_idempotency(make_document())["paths"]["/charges"]["post"]["responses"]["422"]
    assert after["content"]["application/json"] == before["content"]["application/json"]
    assert after["description"].startswith(before["description"])


def test_h15_leaves_what_is_not_covered_alone() -> None:
    document = document_idempotency(make_document())
    assert document["paths"]["/charges"]["get"] == make_document()["paths"]["/charges"]["get"]
    assert document_idempotency(make_document(), paths=[])["paths"] == make_document()["paths"]


def test_h15_a_second_call_changes_nothing() -> None:
    once = document_idempotency(make_document())
    assert document_idempotency(copy.deepcopy(once)) == once


def test_h15_refuses_a_path_that_is_not_in_the_document() -> None:
    with pytest.raises(ConfigurationError, match="/refunds"):
        document_idempotency(make_document(), paths=["/refunds"])
