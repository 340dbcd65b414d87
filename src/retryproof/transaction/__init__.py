"""Work that commits with the caller's own transaction: the public names of inbox, outbox, phased and upserts."""

from retryproof.inbox import Inbox, Received
from retryproof.outbox import Outbox, Relay, RelayPolicy
from retryproof.phased import BlockingPhased, Completer, Phased
from retryproof.upserts import Inserted, Put, ainsert_once, aput_once, insert_once, put_once

__all__ = [
    "BlockingPhased",
    "Completer",
    "Inbox",
    "Inserted",
    "Outbox",
    "Phased",
    "Put",
    "Received",
    "Relay",
    "RelayPolicy",
    "ainsert_once",
    "aput_once",
    "insert_once",
    "put_once",
]
