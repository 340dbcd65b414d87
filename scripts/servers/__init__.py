"""Real servers for the tests: found, else started privately, and only what was started is stopped.

Standard library only, since it runs before any environment exists. For each server of the table, in this order:

1. the environment variable (`RETRYPROOF_TEST_REDIS_URL`, ...), and an error if it does not answer;
2. the standard port on 127.0.0.1, if a probe in the server's own protocol passes;
3. an instance that `scripts/services up` left running, else a private one on a free port;
4. otherwise `Missing`, which names what to install.
"""

from servers.instance import Instance
from servers.order import Missing, RunDirectory, Server, Unanswered, plan, resolve, start_private
from servers.probes import Answer, NoAnswer
from servers.table import SERVICES, Service

__all__ = [
    "SERVICES",
    "Answer",
    "Instance",
    "Missing",
    "NoAnswer",
    "RunDirectory",
    "Server",
    "Service",
    "Unanswered",
    "plan",
    "resolve",
    "start_private",
]
