"""Checkpoints: live objects → staged copy → committed file, and back."""
