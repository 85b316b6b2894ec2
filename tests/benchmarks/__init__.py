"""Speed and memory, as ratios taken in one run: ``python -m tests.benchmarks [SUBJECT…]``.

A subject is a module of this package with a ``main()`` that prints its table; a new one is a new file.
"""
