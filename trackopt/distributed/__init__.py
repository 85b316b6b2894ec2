"""Several processes: collectives, checks that all run the same, and where all of them stop."""
