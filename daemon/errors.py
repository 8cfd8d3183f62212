"""What can go wrong around the daemon, through no fault of ours.

    DaemonError
    ├── ConfigError     the configuration cannot be used (exit code 2)
    ├── InboxError      a drop cannot be taken in, or not yet
    │   ├── ArchiveError    the archive is damaged, encrypted or a bomb
    │   └── NoSpaceError    the disk is full; the drop is safe and is taken in once there is space
    ├── BatchError      there is no such batch, or its record cannot be read
    ├── LockError       another daemon has this home
    ├── RequestError    a command could not be carried out
    ├── WorkerError     the worker process failed
    ├── TrackingError   runs could not be logged to MLflow; tried again later
    └── Stopped         intake was asked to stop; it goes on where it was

Every message is one plain sentence for the person who dropped the data or runs the daemon: what happened,
where the data is, what to do.
"""


class DaemonError(Exception):
    """Root of everything the daemon raises on purpose."""

    exit_code = 1


class ConfigError(DaemonError):
    """The configuration cannot be used. One line per problem."""

    exit_code = 2


class InboxError(DaemonError):
    """A drop cannot be taken in, or not yet."""


class ArchiveError(InboxError):
    """The archive is damaged, encrypted or a bomb; it is kept as it is."""


class NoSpaceError(InboxError):
    """The disk is full; the drop is safe and is taken in once there is space."""


class BatchError(DaemonError):
    """There is no such batch, or its record cannot be read."""


class LockError(DaemonError):
    """Another daemon has this home."""


class RequestError(DaemonError):
    """A command could not be carried out."""


class WorkerError(DaemonError):
    """The worker process failed."""


class TrackingError(DaemonError):
    """Runs could not be logged to MLflow; it is tried again later."""


class Stopped(DaemonError):  # noqa: N818 - a request that was obeyed, not an error
    """Intake was asked to stop between two images; it goes on where it was."""
