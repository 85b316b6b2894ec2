"""Curves of runs: series, panels, comparison, on a terminal and as pictures."""
