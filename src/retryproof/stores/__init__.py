"""Stores of records, by URL or by their classes."""

from retryproof.stores.base import AsyncStore, Capabilities, Reaped, Store
from retryproof.stores.looped import InLoop
from retryproof.stores.memory import MemoryStore
from retryproof.stores.url import aopen_store, open_store

__all__ = ["AsyncStore", "Capabilities", "InLoop", "MemoryStore", "Reaped", "Store", "aopen_store", "open_store"]
