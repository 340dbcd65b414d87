"""Makes any operation safe to retry."""

__version__ = "0.1.0"
