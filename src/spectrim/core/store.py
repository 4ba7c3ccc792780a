"""The work directory: artifacts named by a hash of what made them, written whole or not at all.

Every artifact carries a checksum: the sha256 of its file's bytes with 64 zeros where the checksum itself stands, which
is in the metadata of a safetensors file and first in a JSON file. So header, names, shapes and numbers are all covered.
It is computed once when a file is written, and once in a run that finds the file there, a piece at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectrim.core import distributed

logger = logging.getLogger(__name__)

# Part of every key, as the package's version is: raise it when the meaning of a stored artifact changes.
STORE_VERSION = 3

_SEAL = "sha256"
_ZEROS = "0" * 64
# the checksum stands within the first bytes, after nothing that a caller chooses
_HEAD = 1024
_CARRIED = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
_PIECE = 1 << 20
# what `write_atomically` leaves of an artifact when its process is killed
_LEFT = re.compile(r"\.[0-9a-f]{24}\.(safetensors|json)\.\w+")


class StoreError(Exception):
    """The work directory cannot be used: says which file and what to do."""


def hash_of(fields: Mapping[str, Any]) -> str:
    """A key of JSON data: the same for equal content in any order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def write_atomically(path: str | Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, and rename it: `path` appears whole or not at all."""
    directory = os.path.dirname(path) or "."
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        _unlink(temporary)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write JSON data atomically."""
    write_atomically(path, lambda temporary: _dump(temporary, data))


def _dump(path: str, data: Any) -> None:
    text = json.dumps(data, indent=1) + "\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _checksums(file: BufferedIOBase) -> tuple[str, str, int]:
    """The checksum that a file carries, the one that its bytes give, and where it stands. One reading, by pieces.

    Raises ValueError if it carries none.
    """
    head = file.read(_HEAD)
    found = _CARRIED.search(head)
    if found is None:
        raise ValueError("it carries no checksum" if head else "it is empty")
    digest = hashlib.sha256(head[: found.start(1)] + _ZEROS.encode() + head[found.end(1) :])
    piece = memoryview(bytearray(_PIECE))
    while count := file.readinto(piece):
        digest.update(piece[:count])
    return found[1].decode(), digest.hexdigest(), found.start(1)


def _seal(path: str) -> None:
    """Put a file's checksum in the place of its zeros."""
    with open(path, "r+b") as file:
        carried, actual, place = _checksums(file)
        assert carried == _ZEROS, f"{path} is sealed already"
        file.seek(place)
        file.write(actual.encode())


def _sealed(write: Callable[[str], None], path: str) -> None:
    write(path)
    _seal(path)


def _damage(path: str) -> str | None:
    """What is wrong with an artifact, None if it is whole."""
    try:
        with open(path, "rb") as file:
            carried, actual, _ = _checksums(file)
    except (OSError, ValueError) as error:
        return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return None if carried == actual else "its bytes do not give the checksum that it carries"


def _signature(path: str) -> tuple[int, int, int] | None:
    """What changes with a file, None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _mark(path: str, signature: tuple[int, int, int] | None) -> int:
    """What stands for a file of a work directory, as it is now, in few bytes."""
    directory, name = os.path.split(path)
    return hash((os.path.basename(directory), name, signature))


def appears(path: str | Path, seconds: float = 60.0) -> bool:
    """Whether there is such a file. Of several processes one is waited for that another has written.

    On another machine's disk it may be there a while before it is seen; listing the directory makes it look again.
    """
    until = time.monotonic() + (seconds if distributed.world() > 1 else 0.0)
    while not os.path.exists(path):
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
        if os.path.isdir(directory := os.path.dirname(path) or "."):
            os.listdir(directory)
    return True


class Store:
    """Artifacts of one kind of work in a directory: `<kind>/<key>.safetensors` or `.json`.

    An artifact that is damaged counts as absent: it is removed, and a warning says so. Their paths are strings: a
    `Path` interns its parts, and after thousands of names CPython doubles its table of interned strings (by 4 MB here).
    """

    def __init__(self, directory: Path):
        if directory.exists() and not directory.is_dir():
            raise StoreError(f"the work directory {directory} is a file; give another with --work")
        self.directory = directory
        self.version = version("spectrim")
        # hashes of names and signatures: of thousands of artifacts these themselves would add up
        self._whole: set[int] = set()

    def path(self, kind: str, fields: Mapping[str, Any], suffix: str) -> str:
        """Where the artifact made of `fields` lies; for another version of the package or the store, elsewhere."""
        key = {"store": STORE_VERSION, "spectrim": self.version, "fields": dict(fields)}
        return os.path.join(self.directory, kind, f"{hash_of(key)}.{suffix}")

    def has(self, kind: str, fields: Mapping[str, Any], suffix: str = "safetensors") -> bool:
        """Whether that artifact is there and whole: read once, and again only if the file has changed.

        A damaged one is removed. Raises StoreError if it cannot be.
        """
        return self._is_whole(self.path(kind, fields, suffix))

    def _is_whole(self, path: str) -> bool:
        signature = _signature(path)
        if signature is None:
            return False
        if _mark(path, signature) in self._whole:
            return True
        wrong = _damage(path)
        if _signature(path) != signature:  # another process of this run was faster
            return self._is_whole(path)
        if wrong is None:
            self._whole.add(_mark(path, signature))
            return True
        logger.warning("%s is damaged: %s; it is removed, and made again", path, wrong)
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                _unlink(path)
        except OSError as error:
            raise StoreError(f"{path} is damaged ({wrong}); delete it and run again: {error}") from error
        return False

    def tidy(self) -> None:
        """Remove what killed runs left half written. Only for a run that is alone here: it would break another's."""
        for path in self.directory.glob("*/.*"):
            if _LEFT.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def save(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under what made them."""
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self.path(kind, fields, "safetensors")
        self._write(path, lambda temporary: save_file(contents, temporary, metadata={_SEAL: _ZEROS}))

    def _write(self, path: str, write: Callable[[str], None]) -> None:
        try:
            write_atomically(path, partial(_sealed, write))
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"cannot write {path}: {error}; free some space or give another directory with --work, then run again: "
                "finished work is kept"
            ) from error
        self._whole.add(_mark(path, _signature(path)))

    def remove(self, kind: str, fields: Mapping[str, Any], suffix: str = "safetensors") -> None:
        """Remove that artifact, if it is there."""
        _unlink(self.path(kind, fields, suffix))

    def load(self, kind: str, fields: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """The stored tensors, those whose names begin with `prefix`: only these are read once the file is known whole.

        Raises StoreError if it is not there, or is damaged (it is removed then), or cannot be read.
        """
        path = self._present(kind, fields, "safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in list(file.keys()) if name.startswith(prefix)}
                # a part of a file is held for long; uncopied, what lies beside it in the mapped file would be too
                return {name: tensor.clone() for name, tensor in found.items()} if prefix else found
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it and run again") from error

    def _present(self, kind: str, fields: Mapping[str, Any], suffix: str) -> str:
        path = self.path(kind, fields, suffix)
        if not appears(path) or not self._is_whole(path):
            raise StoreError(f"{path} is missing or was damaged; run again: what is not there is made")
        return path

    def save_json(self, kind: str, fields: Mapping[str, Any], data: Any) -> None:
        """Store JSON data under what made it."""
        self._write(self.path(kind, fields, "json"), lambda path: _dump(path, {_SEAL: _ZEROS, "data": data}))

    def load_json(self, kind: str, fields: Mapping[str, Any]) -> Any:
        """The stored JSON data. Raises StoreError as `load` does."""
        path = self._present(kind, fields, "json")
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)["data"]
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it and run again") from error
