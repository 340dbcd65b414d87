"""The store protocol over SQL: each store hands the plans of `retryproof.sql` to a driver."""
