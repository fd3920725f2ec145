"""The scheduler's view of a device's pool."""

import logging
from collections.abc import Callable
from functools import partial

from kvmesh.backends.base import BlockPool
from kvmesh.kernels.errors import BlockError

logger = logging.getLogger(__name__)


class VerifiedPool:
    """A block that does not verify is an answer, no exception."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def verify(self, block: int) -> bool:
        return _verifies(partial(self._pool.verify_block, block))

    def import_block(self, block: int, data: bytes) -> bool:
        return _verifies(partial(self._pool.import_block, block, data))

    def import_tail(self, slot: int, num_tokens: int, data: bytes) -> bool:
        return _verifies(partial(self._pool.import_tail, slot, num_tokens, data))


def _verifies(call: Callable[[], None]) -> bool:
    try:
        call()
    except BlockError as error:
        logger.warning("cached K and V are computed again: %s", error)
        return False
    return True
