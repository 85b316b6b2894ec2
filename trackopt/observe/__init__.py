"""What an optimizer does, seen from its own step hooks; the optimizer itself is never touched."""

from trackopt.observe.hooks import Observer
from trackopt.observe.hyperparameters import params

__all__ = ["Observer", "params"]
