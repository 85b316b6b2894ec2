"""The backends that a journal is delivered to, one per file."""
