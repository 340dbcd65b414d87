"""SQLite: its statements and plans by subject, its schema, and the file that runs them."""
