"""Memory: freed pieces go back to the system, so that a run over many blocks stays as small as over one."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_SMALL = 2**23
TIGHT = 2**16  # where memory is limited, or a model is made without weights: each would leave a hole
LARGE = 2**20  # of a tensor that is written: what it was made of is worth giving back
_ADAPTED = 2**25  # where glibc's own threshold ends up once large tensors have been freed
_thresholds = [_ADAPTED]  # of what is entered now, the innermost last


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def small(least: int = _SMALL) -> Iterator[None]:
    """While inside, what is allocated of `least` bytes or more leaves the process when freed (glibc only).

    By itself glibc puts pieces of up to 32 MiB into its heap, between small ones that live on, and a run holds up to
    half as much again as it uses. From `TIGHT` on, the pages that come and go take up to a tenth of a compression, and
    from 1 MiB on its peak still grew with the number of blocks. Also a decorator. The innermost counts.
    """
    _thresholds.append(least)
    _set_threshold()
    try:
        yield
    finally:
        _thresholds.pop()
        _set_threshold()


def _set_threshold() -> None:
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _thresholds[-1])


def peak() -> int:
    """The most bytes of memory that this process has held at once.

    On Linux VmHWM rather than ru_maxrss, which also counts what the parent held before this program began.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # macOS counts bytes, the others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_machine() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back() -> None:
    """Return the pages of smaller pieces that were freed (glibc only); once a block it costs milliseconds."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
