"""The rehearsal: a user's own command, run uninterrupted and under SIGKILL, and compared bit for bit.

Two processes communicate by an environment variable (``rundir.environment``) and a file of steps (``trace``):

* In the training process, ``probe`` records the steps of a run of ``wrap``, and ``step_recorder``, which ``injection``
  attaches, those of any other training: the inputs of each step (``fingerprint``) with the script's untracked state
  (``untracked_state``, ``values``). Both kill the process after the planned step. They need torch.
* In the command's process, ``rehearse`` runs the command in a copy of the directory (``workspace``), and ``comparison``
  finds the cause of a difference: ``diagnosis`` for runs of ``wrap``, ``resume_fault`` for other trainings. No torch.
"""
