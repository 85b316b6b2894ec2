"""Optimizers and schedulers of other packages, and torch's own in every configuration, under ``wrap``.

Each class trains alone and under ``wrap``, which must give the same bits; it is killed and resumed, which must give
them again. A class that plain ``torch.save`` and ``torch.load`` cannot resume either has a fault of its own.

* ``training``: small trainings, and the ways in which optimizers are stepped
* ``construct``: how a class is constructed, found by its signature
* ``catalog``: the packages, their classes, and the numbers that must be reached
* ``torch_database``: the configurations of torch's own optimizers, from torch's own tests
* ``check``: what is done with one class; ``attempt``: one attempt of a training under ``wrap``
* ``reference``: the statistics of the state in float64
* ``runner``: one process for each package, one for each class

``python -m tests.robustness.optimizers`` is the full form; ``tests/robustness/test_optimizers.py`` takes a part.
"""
