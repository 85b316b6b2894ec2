"""A structure-aware fuzzer of everything that reads: ``python -m tests.robustness.fuzz --count 100000``.

Real files and hostile ones are mutated in their bytes, in the fields of their zip headers and in the operations of
their pickles, and are looked at as `inspect` and `verify` do. Each must be answered or refused with an ArchiveError.
"""
