"""What can go wrong when a backend is chosen or a checkpoint is opened.

Every message names the file or the backend, the value found and the limit or the set allowed.
"""

from collections.abc import Mapping


class BackendError(Exception):
    """Root of this tree."""


class CheckpointError(BackendError):
    """A checkpoint file is missing, truncated, malformed or of a kind that is not supported."""


class BackendUnavailable(BackendError):
    """No backend of that name, or this machine cannot run it.

    failures: backend name -> reason, one entry for each backend that was tried.
    """

    def __init__(self, message: str, failures: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class DeviceError(BackendError):
    """A device file is unknown, malformed or holds a value out of its limits."""


class ShapeError(BackendError):
    """A model's shape is unknown or malformed, or a way to run it does not go with it."""


class DoesNotFit(ShapeError):
    """A model's weights do not fit. needed: devices that would hold it, None if none would."""

    def __init__(self, message: str, needed: int | None) -> None:
        super().__init__(message)
        self.needed = needed
