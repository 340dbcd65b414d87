"""PostgreSQL: its statements and plans by subject, its migrations, and its drivers psycopg and asyncpg."""
