"""Upserts where the client knows the id: created, or already there, with the row (T8)."""

from retryproof.upserts.dynamodb import Put, aput_once, put_once
from retryproof.upserts.insert_once import Inserted, ainsert_once, insert_once

__all__ = ["Inserted", "Put", "ainsert_once", "aput_once", "insert_once", "put_once"]
