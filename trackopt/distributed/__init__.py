"""Several processes: collectives, a check that all run the same, and a common step to stop or save at."""
