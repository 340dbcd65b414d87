"""Django inside the middleware, ASGI or WSGI: the exception of a view, before Django makes a response of it.

Django answers an exception with a 500 of its own, so the middleware never sees it. If Django is loaded, the middleware
imports this file, and Django's signal reports the exception: `OutcomeUnknown` keeps the record, as everywhere (C5). If
a middleware or a view answers the exception itself, there is no signal: it has to call `operation.outcome_unknown()`.
"""

from __future__ import annotations

import sys
from typing import Any

from django.core.signals import got_request_exception  # type: ignore[import-untyped]  # no types of its own

from retryproof.operation import current_operation


def _hear(**_: Any) -> None:
    operation, error = current_operation(default=None), sys.exception()
    if operation is not None and error is not None:
        operation.hear(error)


got_request_exception.connect(_hear, dispatch_uid="retryproof.http.django")
