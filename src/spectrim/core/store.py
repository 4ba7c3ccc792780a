"""The work directory: artifacts named by a hash of what made them, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Part of every key: raise it when the meaning of a stored artifact changes.
STORE_VERSION = 2


class StoreError(Exception):
    """The work directory cannot be used: says which file and what to do."""


def hash_of(fields: Mapping[str, Any]) -> str:
    """A key of JSON data: the same for equal content in any order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, and rename it: `path` appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, data: Any) -> None:
    """Write JSON data atomically."""
    write_atomically(path, lambda temporary: _dump(temporary, data))


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


class Store:
    """Artifacts of one kind of work in a directory: `<kind>/<key>.safetensors` or `.json`."""

    def __init__(self, directory: Path):
        if directory.exists() and not directory.is_dir():
            raise StoreError(f"the work directory {directory} is a file; give another with --work")
        self.directory = directory

    def path(self, kind: str, fields: Mapping[str, Any], suffix: str) -> Path:
        """Where the artifact made of `fields` lies."""
        return self.directory / kind / f"{hash_of({'store': STORE_VERSION, **fields})}.{suffix}"

    def has(self, kind: str, fields: Mapping[str, Any], suffix: str = "safetensors") -> bool:
        """Whether that artifact is there."""
        return self.path(kind, fields, suffix).exists()

    def save(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under what made them."""
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(self.path(kind, fields, "safetensors"), lambda path: save_file(contents, path))

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write_atomically(path, write)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"cannot write {path}: {error}; free some space or give another directory with --work, then run again: "
                "finished work is kept"
            ) from error

    def remove(self, kind: str, fields: Mapping[str, Any], suffix: str = "safetensors") -> None:
        """Remove that artifact, if it is there."""
        self.path(kind, fields, suffix).unlink(missing_ok=True)

    def load(self, kind: str, fields: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """The stored tensors, those whose names begin with `prefix`. Raises StoreError if they cannot be read."""
        path = self.path(kind, fields, "safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                known = list(file.keys())
                return {name: file.get_tensor(name) for name in known if name.startswith(prefix)}
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it and run again") from error

    def save_json(self, kind: str, fields: Mapping[str, Any], data: Any) -> None:
        """Store JSON data under what made it."""
        self._write(self.path(kind, fields, "json"), lambda path: _dump(path, data))

    def load_json(self, kind: str, fields: Mapping[str, Any]) -> Any:
        """The stored JSON data. Raises StoreError if it cannot be read."""
        path = self.path(kind, fields, "json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it and run again") from error
