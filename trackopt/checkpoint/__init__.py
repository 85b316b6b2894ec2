"""Checkpoints: live objects → captured state → committed file, and back."""

from trackopt.checkpoint.restore import restore
from trackopt.checkpoint.snapshot import Training, capture
from trackopt.checkpoint.store import Store

__all__ = ["Store", "Training", "capture", "restore"]
