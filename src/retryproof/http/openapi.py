"""Describes the layer in an OpenAPI document: the header, the answers it may give, and how long it remembers (H15)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from retryproof.core.errors import ConfigurationError
from retryproof.core.policy import Policy
from retryproof.http import problem as problems
from retryproof.http.problem import ProblemType
from retryproof.http.semantics import covered_methods

_ANSWERS: Mapping[str, tuple[ProblemType, ...]] = {
    "400": (problems.KEY_MISSING, problems.KEY_INVALID),
    "409": (problems.IN_PROGRESS, problems.OUTCOME_UNKNOWN),
    "413": (problems.BODY_TOO_LARGE,),
    "422": (problems.KEY_REUSED,),
    "503": (problems.STORE_UNAVAILABLE,),
}
_RETRIED = ("409", "503")
PROBLEM = "IdempotencyProblem"


def document_idempotency(
    document: dict[str, Any],
    *,
    methods: Iterable[str] = ("POST", "PATCH"),
    required: bool = False,
    retention: float = Policy().retention,
    header: str = "Idempotency-Key",
    replay_header: str = "Idempotency-Replayed",
    paths: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Add the middleware to every operation that it covers, in place; return the document. A second call changes
    nothing.

    retention: seconds, as in the policy. paths: the covered paths, as in the document; None for all.
    """
    chosen = {method.lower() for method in covered_methods(methods)}
    described = document.get("paths", {})
    wanted = set(described) if paths is None else set(paths)
    if not wanted <= set(described):
        raise ConfigurationError(f"paths: {', '.join(sorted(wanted - set(described)))} is not in the document.")
    parameter = _parameter(header, required, retention)
    for path in sorted(wanted):
        for method in chosen & set(described[path]):
            _describe(described[path][method], parameter, replay_header)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.setdefault(PROBLEM, _schema())
    return document


def _parameter(header: str, required: bool, retention: float) -> dict[str, Any]:
    return {
        "name": header,
        "in": "header",
        "required": required,
        "description": (
            "Names this operation. Send a new random key (a UUIDv4) with a new request and the same key with every "
            f"retry of it: it takes effect once, and for {_duration(retention)} a retry gets the first response again."
        ),
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
        "example": "8e03978e-40d5-43dd-bc93-6894a57f9324",
    }


def _describe(operation: dict[str, Any], parameter: dict[str, Any], replay_header: str) -> None:
    parameters = operation.setdefault("parameters", [])
    if not any(_same(existing, parameter) for existing in parameters):
        parameters.append(dict(parameter))
    responses = operation.setdefault("responses", {})
    for status, response in responses.items():
        if str(status)[:1] in "23":
            response.setdefault("headers", {}).setdefault(replay_header, _replay_mark())
    for status, kinds in _ANSWERS.items():
        _add_answer(responses, status, kinds)


def _same(existing: Mapping[str, Any], parameter: Mapping[str, Any]) -> bool:
    return existing.get("in") == "header" and str(existing.get("name", "")).lower() == str(parameter["name"]).lower()


def _replay_mark() -> dict[str, Any]:
    return {
        "description": "`true` when this is the stored response of an earlier request with the same key.",
        "schema": {"type": "string", "enum": ["true"]},
    }


def _add_answer(responses: dict[str, Any], status: str, kinds: tuple[ProblemType, ...]) -> None:
    text = "; ".join(f"{kind.title} (`{kind.code}`)" for kind in kinds) + "."
    answer = responses.setdefault(status, {"description": text})
    if text not in answer.get("description", ""):
        answer["description"] = f"{answer.get('description', '')} Or: {text}".strip()
    content = answer.setdefault("content", {})
    content.setdefault("application/problem+json", {"schema": {"$ref": f"#/components/schemas/{PROBLEM}"}})
    if status in _RETRIED:
        retry = {"description": "Seconds to wait, where a retry helps.", "schema": {"type": "integer"}}
        answer.setdefault("headers", {}).setdefault("Retry-After", retry)


def _schema() -> dict[str, Any]:
    return {
        "title": "Idempotency problem",
        "description": "Why a request was refused by the idempotency layer (RFC 9457).",
        "type": "object",
        "required": ["type", "title", "status", "code", "detail"],
        "properties": {
            "type": {"type": "string", "format": "uri"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "code": {"type": "string", "enum": sorted(problems.KINDS)},
            "detail": {"type": "string"},
            "operation": {"type": "string", "description": "Stands for the operation in the service's logs."},
        },
    }


def _duration(seconds: float) -> str:
    for unit, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= unit and seconds % unit == 0:
            count = int(seconds // unit)
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{seconds:g} seconds"
