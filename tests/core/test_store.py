"""The work directory: whole files or none, under keys of all that made them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from spectrim.core import store as stores
from spectrim.core.store import Store, StoreError, hash_of, write_atomically, write_json

FIELDS = {"weights": "abc", "target": {"name": "q", "sizes": [3, 4]}, "ratio": 0.2, "text": None}


class Killed(BaseException):
    """Like the signal that ends a process."""


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt, Killed])
def test_a_failing_writer_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise failure("stopped")

    for path in (tmp_path / "new.json", tmp_path / "old.json"):
        if path.stem == "old":
            path.write_text("whole")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(failure, match="stopped"):
            write_atomically(path, write)
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.json").read_text() == "whole"


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        assert temporary.parent == path.parent, "a rename across file systems is no rename"
        assert not path.exists()
        temporary.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_size)
        assert not (tmp_path / "file").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "file", 12345)
    assert synced == [len("12345\n")]


def test_files_have_the_usual_rights(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "data.json", {"a": 1})
    finally:
        os.umask(old)
    assert (tmp_path / "data.json").stat().st_mode & 0o777 == 0o640
    assert json.loads((tmp_path / "data.json").read_text()) == {"a": 1}


def test_json_with_what_cannot_be_written_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "data.json", [object()])
    assert json.loads((tmp_path / "data.json").read_text()) == [1]


def test_a_key_changes_with_any_field() -> None:
    changed = [
        FIELDS,
        {**FIELDS, "weights": "abd"},
        {**FIELDS, "target": {"name": "k", "sizes": [3, 4]}},
        {**FIELDS, "target": {"name": "q", "sizes": [4, 3]}},
        {**FIELDS, "ratio": 0.3},
        {**FIELDS, "text": "None"},
        {**FIELDS, "more": None},
        {name: value for name, value in FIELDS.items() if name != "text"},
    ]
    assert len({hash_of(fields) for fields in changed}) == len(changed)


def test_a_key_does_not_depend_on_the_order_of_fields() -> None:
    assert hash_of(dict(reversed(FIELDS.items()))) == hash_of(FIELDS)


def test_a_key_changes_with_the_version_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.ones(2)})
    assert store.has("gram", FIELDS)
    monkeypatch.setattr(stores, "STORE_VERSION", stores.STORE_VERSION + 1)
    assert not store.has("gram", FIELDS)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    tensors = {
        "whole": matrix,
        "columns": matrix[:, :2],
        "transposed": matrix.T.clone().T,
        "half": torch.randn(3).bfloat16(),
        "trained": torch.randn(2, requires_grad=True),
        "empty": torch.zeros(0, 3),
    }
    store = Store(tmp_path)
    store.save("candidate", FIELDS, tensors)
    found = Store(tmp_path).load("candidate", FIELDS)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert store.load("candidate", FIELDS, prefix="ha").keys() == {"half"}


def test_kinds_and_suffixes_are_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("candidate", FIELDS, {"value": torch.ones(2)})
    assert store.has("candidate", FIELDS)
    assert not store.has("statistics", FIELDS)
    assert not store.has("candidate", FIELDS, "json")
    store.save_json("candidate", FIELDS, {"b": 2})
    assert json.loads(store.path("candidate", FIELDS, "json").read_text()) == {"b": 2}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "other"):
        store = Store(tmp_path / name)
        store.save("gram", FIELDS, {"b": torch.ones(2), "a": torch.zeros(3)})
        files.append(store.path("gram", FIELDS, "safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "not tensors", "a folder"])
def test_what_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.ones(100)})
    path = store.path("gram", FIELDS, "safetensors")
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut off": content[:-8], "not tensors": b"x" * 500}[damage])
    with pytest.raises(StoreError, match="delete it and run again") as error:
        store.load("gram", FIELDS)
    assert str(path) in str(error.value)


def test_a_work_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"is a file.*--work") as error:
        Store(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_a_work_directory_that_cannot_be_made_is_named_with_the_first_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "below")
    with pytest.raises(StoreError, match="--work") as error:
        store.save("gram", FIELDS, {"value": torch.ones(2)})
    assert str(store.directory) in str(error.value)


def test_a_full_disk_is_a_store_error_that_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.ones(2)})

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    for write in (
        lambda: store.save("gram", FIELDS, {"value": torch.zeros(2)}),
        lambda: store.save_json("plan", FIELDS, {"a": 1}),
    ):
        with pytest.raises(StoreError, match=r"No space left.*--work"):
            write()
    assert torch.equal(store.load("gram", FIELDS)["value"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [store.path("gram", FIELDS, "safetensors").name]


def test_opening_a_store_writes_nothing(tmp_path: Path) -> None:
    assert not Store(tmp_path / "work").has("gram", FIELDS)
    assert not list(tmp_path.iterdir())
