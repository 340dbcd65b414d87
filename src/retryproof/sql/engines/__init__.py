"""Where a caller's engine or alias leads: the same targets that a URL of the database itself names.

Connections to PostgreSQL are made as the caller's library makes its own: with its settings, its connect arguments and
its hooks. They do not come from its pool: a handler may hold the pool's last connection while it waits for its record,
and leases have to be renewed however many connections handlers hold. A SQLite file is opened by its name.
"""
