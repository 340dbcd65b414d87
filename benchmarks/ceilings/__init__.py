"""Hand-written minimal code for the same guarantees: what the library is measured against."""
