"""Every error that trackopt raises on purpose.

::

    TrackoptError
    ├── UsageError          an argument, a metric or a call that makes no sense
    ├── RunError            a run's directory: taken, foreign, not writable
    ├── CheckpointError     a checkpoint that cannot be written, or none that can be used
    │   └── MismatchError   a valid checkpoint of something else: another model, optimizer or scheduler
    ├── ArchiveError        a file that is not a checkpoint, or is damaged
    │   ├── ArchiveLimitError   a file that describes more than is read; it may be valid
    │   └── ForeignFormatError  a file of another program's, which may be intact
    └── MissingPackageError  a package that only some commands and functions need is not installed

Each message is one line: what, where, and what to do. The command line prints it and exits with 2.
"""

from __future__ import annotations


class TrackoptError(Exception):
    """The root: ``except trackopt.TrackoptError`` catches whatever trackopt raises on purpose."""


class UsageError(TrackoptError, ValueError):
    """An argument, a metric or a call that makes no sense."""


class RunError(TrackoptError):
    """A run's directory cannot be used: taken by another process, foreign, or not writable."""


class CheckpointError(TrackoptError):
    """A checkpoint cannot be written, or there is none that can be used."""


class MismatchError(CheckpointError):
    """A valid checkpoint does not fit the live objects; nothing was changed."""


class ArchiveError(TrackoptError):
    """A file is not a checkpoint that trackopt reads, or it is damaged."""


class ArchiveLimitError(ArchiveError):
    """A file describes more than the reader's limits allow for its size; it may be valid, and was not checked."""


class ForeignFormatError(ArchiveError):
    """A file is in another format than those of checkpoints; it may be intact."""


class MissingPackageError(TrackoptError, ImportError):
    """A package that only some commands and functions need is not installed."""
