"""The demo: a small payments API, a bad network, clients that retry, and a server that is killed again and again.

`app` and `ledger` are the API, `server` runs it in a process of its own, `process` starts and kills that process,
`clients` are the customers, `report` counts the charges in the ledger and prints, `runner` runs everything.
"""

from importlib.util import find_spec

REQUIRED = ("fastapi", "uvicorn", "httpx", "rich")
missing = [name for name in REQUIRED if find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(f"The demo needs {', '.join(missing)}: pip install 'retryproof[demo]'", name=missing[0])
