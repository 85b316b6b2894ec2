"""What the journals of runs show: series, comparisons, and how they are laid out in panels."""
