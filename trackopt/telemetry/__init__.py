"""Telemetry: optimizer step → statistics → one line of the journal."""
