"""Work that commits with the caller's own transaction."""

from retryproof.transaction.completer import Completer
from retryproof.transaction.dynamodb import Put, aput_once, put_once
from retryproof.transaction.inbox import Inbox, Received
from retryproof.transaction.insert_once import Inserted, ainsert_once, insert_once
from retryproof.transaction.outbox import Outbox
from retryproof.transaction.phased import BlockingPhased, Phased
from retryproof.transaction.relay import Relay
from retryproof.transaction.relay_policy import RelayPolicy

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
