"""The backends that a journal is delivered to, one in each file."""
