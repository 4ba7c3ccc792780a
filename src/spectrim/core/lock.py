"""One run at a time on a directory: a lock that says who holds it, and that ends with the process that does."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spectrim.core import distributed
from spectrim.core.store import StoreError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = ".lock"
# what flock says where the file system has no locks
_WITHOUT = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
_TRIES = 20


@contextmanager
def held(directory: Path, option: str = "--work") -> Iterator[bool]:
    """Hold the lock of a directory, which is made if needed, and gone again at the end if nothing was put there.

    Of several processes of one job the first one holds it for all: the others are to wait until it does. Yields whether
    this process holds it, so that no other run is there for sure; on a file system without locks none does, and a
    warning says so. Raises StoreError, naming the owner and the
    `option` that gives another directory, if another run holds it, and if the directory cannot be made.
    """
    if not distributed.first():
        yield False
        return
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    handle = None
    try:
        handle = _taken(directory, option)
        yield handle is not None
    finally:
        if handle is not None:
            _release(handle, directory / NAME)
        _remove_empty(missing)


def _taken(directory: Path, option: str) -> int | None:
    """An open file that is locked and lies at the lock's path; None where there are no locks."""
    path = directory / NAME
    for _ in range(_TRIES):
        handle = _open(path, option)
        if handle is None:
            continue
        try:
            if not _lock(handle, path):
                os.close(handle)
                return None
            # the owner before removes the file: a lock on a file without a name is none
            if _lies_at(handle, path):
                _sign(handle)
                return handle
        except BlockingIOError as error:
            owner = _owner(handle)
            os.close(handle)
            raise StoreError(
                f"{directory} is in use by {owner}. Wait until that run ends or stop it, or give another directory "
                f"with {option}"
            ) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise StoreError(f"{path} keeps vanishing: other runs come and go in {directory}; give another with {option}")


def _open(path: Path, option: str) -> int | None:
    """The lock's file, None if its directory was removed at this very moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot use {path.parent}: {error}; give another directory with {option}") from error


def _lock(handle: int, path: Path) -> bool:
    """Lock an open file; False where there are no locks. Raises BlockingIOError if another process has it."""
    why = "this system has no flock"
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise StoreError(f"cannot lock {path}: {error}") from error
            why = str(error.strerror)
    path.unlink(missing_ok=True)
    logger.warning("%s cannot be locked (%s): start no second run on it while this one works", path.parent, why)
    return False


def _lies_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Say who holds the lock, in one write."""
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(owner).encode(), 0)


def _owner(handle: int) -> str:
    """Who holds the lock, in words; a process that has just taken it gets a moment to sign."""
    for _ in range(_TRIES):
        try:
            owner = json.loads(os.pread(handle, 1 << 16, 0))
            return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
        except (ValueError, KeyError):
            time.sleep(0.05)
    return "another process, which has not signed its lock"


def _release(handle: int, path: Path) -> None:
    """Remove the lock's file while it is still locked, and let it go."""
    try:
        if _lies_at(handle, path):
            path.unlink()
    finally:
        os.close(handle)


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        if not directory.is_dir() or any(directory.iterdir()):
            return
        directory.rmdir()
