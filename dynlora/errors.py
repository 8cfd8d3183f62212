"""What can go wrong while learning, through no fault of ours.

DynloraError
├── ModelError        the model cannot be loaded, or its architecture cannot be adapted
├── TaskError         the images, labels or names of a task do not fit together
├── CheckpointError   a checkpoint does not belong to this task and these settings
└── Interrupted       learning was asked to stop; the checkpoint it left can be resumed
"""


class DynloraError(Exception):
    """Root of everything dynlora raises on purpose."""


class ModelError(DynloraError):
    """The model cannot be loaded, or its architecture cannot be adapted."""


class TaskError(DynloraError):
    """The images, labels or names of a task do not fit together."""


class CheckpointError(DynloraError):
    """A checkpoint does not belong to this task and these settings."""


class Interrupted(DynloraError):  # noqa: N818 - a request that was obeyed, not an error
    """Learning was asked to stop; the checkpoint it left can be resumed."""
