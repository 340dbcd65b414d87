"""Coalescing: what arrives while a batch is on its way travels in the next one.

No timers and no waiting for company: an idle system sends a batch of one at once, a busy one pays one round trip, one
script, one commit for many operations. An operation's id stands once in a batch. A twin of a claim that has not
left yet is decided by that claim's answer; any other command for the same id travels in the next batch.

`TaskCoalescer` serves the tasks of one event loop over an async store, one lane a kind of command, with one batch on
its way, or several where the store says so; no two hold the same id. `ThreadCoalescer` is the line of all who use a
blocking store: the thread that finds nobody sending sends the batch for all that have come meanwhile, and the first
in line takes over. `Bridge` puts the tasks of every event loop in the same line and sends for them in a thread of its
own; there a batch waits for those who were just answered, for one round of their loop, since a commit costs more than
that.
"""

from retryproof.stores.lanes.bridge import Bridge, BridgeEnd
from retryproof.stores.lanes.tasks import TaskCoalescer
from retryproof.stores.lanes.threads import ThreadCoalescer

__all__ = ["Bridge", "BridgeEnd", "TaskCoalescer", "ThreadCoalescer"]
