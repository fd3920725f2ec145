"""The key file on disk: read, replaced whole, and read again when it has changed."""

import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmesh.services.common.api_keys import KeyDocument, KeyTable, empty_document, parse_document
from kvmesh.services.common.errors import ConfigError

logger = logging.getLogger(__name__)

POLL_S = 1.0  # between looks at the file
Signature = tuple[int, int, int]


def read_document(path: Path) -> KeyDocument:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        return parse_document(path.read_text(), f"key file {path}")
    except OSError as error:
        raise ConfigError(
            f"cannot read the key file {path}: {error.strerror}; "
            f"'kvmesh keys new TENANT --file {path}' makes one"
        ) from error
    except UnicodeDecodeError:
        raise ConfigError(f"key file {path} is no text") from None


@contextmanager
def changing(path: Path) -> Iterator[list[KeyDocument]]:
    """The file's document in a list, to be replaced there; written when the block ends well.

    A file that is not there begins empty. One writer at a time; a reader sees the old file or the
    new one. Only its owner can read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = [read_document(path) if path.exists() else empty_document()]
        yield held
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(held[0].model_dump_json(indent=1, exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


class KeyFile:
    """The keys of a file, as new as a second ago. clock: monotonic seconds.

    The file is looked at when somebody asks, so there is nothing to stop. One that cannot be read
    any more, or is wrong, leaves the keys as they were: a slip in an editor locks nobody out.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if it cannot be read now."""
        self._path = path
        self._clock = clock
        self._signature = _signature(path)
        self._table = KeyTable(read_document(path))
        self._looked = clock()
        self.failures = 0  # versions of the file that were not taken
        if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            logger.warning("key file %s is open to other users; chmod 600 it", path)

    def table(self) -> KeyTable:
        now = self._clock()
        if now - self._looked >= POLL_S:
            self._looked = now
            self._look()
        return self._table

    def _look(self) -> None:
        found = _signature(self._path)
        if found == self._signature:
            return
        self._signature = found
        try:
            self._table = KeyTable(read_document(self._path))
        except ConfigError as error:
            self.failures += 1
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("key file %s was read again", self._path)


def _signature(path: Path) -> Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
