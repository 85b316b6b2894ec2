"""The rehearsal: a user's own command, run uninterrupted and under SIGKILL, and compared bit for bit.

Two processes communicate by an environment variable (``rundir.environment``) and a file next to each journal
(``trace``):

* In the training process, ``probe`` records the inputs of each step (``fingerprint``) with the script's untracked
  state (``untracked_state``), and kills the process after the planned step. Needs torch.
* In the command's process, ``rehearse`` runs the command and compares; ``diagnosis`` finds the cause. No torch.
"""
