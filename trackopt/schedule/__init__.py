"""Schedules without a training: what is written, which class it is, and the learning rates it gives."""
