"""Work that commits with the caller's own transaction."""
