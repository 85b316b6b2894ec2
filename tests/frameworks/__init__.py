"""Scripts that write real checkpoints with real frameworks.

Each takes the directory to write to, and prints as JSON what it told the framework, or was told by it. They
run in processes of their own: the frameworks warn, and their import takes seconds.
"""
