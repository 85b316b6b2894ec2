"""Fault injection: a training that is killed, hindered or left by a crash at every place, and then resumed.

A case begins in a prepared directory. One process does the harm, another resumes and trains to the end, and the outcome
must be that of the training which nothing happened to, to the last bit, with nothing lost that was acknowledged:

* ``training``: the training, and what it told to be done, in memory that outlives it
* ``server``, ``forks``: a process that has torch loaded and forks one child for each case, with strace on it or without
* ``fixtures``: prepared directories, the resumption, and the verdict
* ``calls``: which system calls a training makes, by strace
* ``sweep``, ``kills``, ``flips``, ``crashes``: the four kinds of harm
* ``tally``: what came of all

``python -m tests.robustness.faults`` is the full form; ``tests/robustness/test_faults.py`` takes a sample.
"""
