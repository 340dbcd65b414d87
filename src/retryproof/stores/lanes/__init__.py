"""Coalescing: commands that arrive while a batch is under way are sent in the next batch.

There are no timers, and a command never waits for others to come. An idle system sends a batch of one at once. A busy
system pays one round trip, one script or one commit for many operations. An operation's id is only once in a batch. If
a claim has not been sent yet, its answer also decides its twins; any other command for the same id goes into the next
batch.

- `TaskCoalescer` serves the tasks of one event loop over an async store. Each kind of command has a queue (a lane),
  with one batch under way, or several if the store says so. No two batches have the same id.
- `ThreadCoalescer` is the queue of all callers of a blocking store. A thread that finds nobody sending becomes the
  leader. It sends the batch for all commands in the queue, and then the first one in the queue takes over.
- `Bridge` puts the commands of tasks, from every event loop, into the same queue, and sends them in one thread. There,
  a batch waits for tasks that just got an answer, for one round of their loop, since a commit costs more than that.
"""

from retryproof.stores.lanes.bridge import Bridge, BridgeEnd
from retryproof.stores.lanes.tasks import TaskCoalescer
from retryproof.stores.lanes.threads import ThreadCoalescer

__all__ = ["Bridge", "BridgeEnd", "TaskCoalescer", "ThreadCoalescer"]
