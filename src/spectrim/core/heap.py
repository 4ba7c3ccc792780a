"""Freed memory goes back to the system at once, so that a run over many blocks stays as small as over one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_SMALL = 2**20
_ADAPTED = 2**25  # where glibc's own threshold ends up once large tensors have been freed


@contextmanager
def small() -> Iterator[None]:
    """While inside, what is allocated of 1 MiB or more leaves the process when freed (glibc only); also a decorator.

    By itself glibc puts pieces of up to 32 MiB into its heap, between small ones that live on: the skeleton of a model
    alone leaves a hole for each of its weights, which a streamed run would fill block by block.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _ADAPTED)
