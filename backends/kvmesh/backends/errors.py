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
