"""Telemetry for loops that belong to a framework, which keeps its own checkpoints; one file for each framework."""
