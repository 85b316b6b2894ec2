"""The rehearsal: a user's own command, uninterrupted and then under SIGKILL, compared bit for bit.

Two sides that meet in an environment variable (``plan``) and a file beside each journal (``trace``):

* in the training process ``probe`` writes down what each step came from (``fingerprint``), with what the script keeps
  to itself (``find_untracked``), and kills the process where the plan says; torch
* in the command's process ``rehearse`` runs and compares, and ``verdict`` tells the cause; no torch
"""
