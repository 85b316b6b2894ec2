"""A pickle machine that runs nothing of what it reads."""
