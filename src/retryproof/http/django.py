"""Django inside of a layer, ASGI or WSGI: what a view raises, before Django makes a response of it.

Django answers an exception with a 500 of its own, so that the layer never sees it. Where Django is loaded, the layer
imports this file, and Django's signal then says what was raised: `OutcomeUnknown` keeps the record as it does anywhere
(C5). A middleware or a view that answers the exception itself sends no signal, and has to call
`operation.outcome_unknown()`.
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
