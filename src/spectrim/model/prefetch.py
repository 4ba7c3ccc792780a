"""The next block's tensors, read from disk while a GPU works on this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

logger = logging.getLogger(__name__)


class Ahead:
    """At most one set of tensors, read by a thread into memory that a GPU copies from by itself (pinned)."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._begun: tuple[list[str], Future[dict[str, Tensor]]] | None = None

    def begin(self, keys: Sequence[str]) -> None:
        """Begin to read these; what was begun before, and never taken, is let go."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="spectrim-prefetch")
        self.drop()
        self._begun = list(keys), self._pool.submit(lambda: {key: pinned(self._read(key)) for key in keys})

    def take(self, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """These tensors, once they are read; None where something else was begun, which is let go.

        Raises what reading them raised.
        """
        begun = self._begun
        if begun is None or begun[0] != list(keys):
            self.drop()
            return None
        self._begun = None
        return begun[1].result()

    def drop(self) -> None:
        """Let go what was begun: not waited for, and not held once it is read."""
        if self._begun is not None:
            self._begun[1].cancel()
        self._begun = None


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory; where the system grants no more of it the tensor itself, with a warning."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        logger.warning("no memory could be pinned for the next block, which is copied more slowly: %s", reason)
        return tensor
