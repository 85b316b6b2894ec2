"""What an optimizer is doing: hooks on the live object, and the statistics of its buffers."""

from trackopt.observe.hooks import Observer
from trackopt.observe.hyperparameters import params
from trackopt.observe.ledger import Ledger, Turns
from trackopt.observe.meter import FIRST_MOMENTS, NonFinite
from trackopt.observe.reading import Reading

__all__ = ["FIRST_MOMENTS", "Ledger", "NonFinite", "Observer", "Reading", "Turns", "params"]
