"""SQL by engine and subject: statements, plans, dialects, and the drivers that run them.

What is the same for all engines stands here; a folder an engine has its statements, its migrations and its drivers.
Nothing in this package knows a store, an operation's handler or a request.
"""
