"""Telemetry for the loops of frameworks, which keep their own checkpoints; one file for each framework."""
