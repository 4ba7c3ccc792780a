"""The work directory: whole files or none, under keys of all that made them."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectrim.core import store as stores
from spectrim.core.store import Store, StoreError, hash_of, write_atomically, write_json

FIELDS = {"weights": "abc", "target": {"name": "q", "sizes": [3, 4]}, "ratio": 0.2, "text": None}


class Killed(BaseException):
    """Like the signal that ends a process."""


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt, Killed])
def test_a_failing_writer_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    def write(path: str) -> None:
        Path(path).write_text("half")
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

    def write(name: str) -> None:
        temporary = Path(name)
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
    assert not store.has("gram", FIELDS) and not Store(tmp_path).has("gram", FIELDS)


def test_a_key_changes_with_the_version_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save_json("plan", FIELDS, [1])
    assert Store(tmp_path).has("plan", FIELDS, "json")
    monkeypatch.setattr(stores, "version", lambda name: {"spectrim": "99.0"}[name])
    assert not Store(tmp_path).has("plan", FIELDS, "json")


def test_an_artifact_of_the_store_before_is_not_used(tmp_path: Path) -> None:
    """Version 2 had no checksums, and the fields beside the version."""
    before = tmp_path / "gram" / f"{hash_of({'store': 2, **FIELDS})}.safetensors"
    before.parent.mkdir()
    save_file({"value": torch.ones(2)}, before)
    assert not Store(tmp_path).has("gram", FIELDS) and before.exists()


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
    assert store.load_json("candidate", FIELDS) == {"b": 2}
    assert json.loads(Path(store.path("candidate", FIELDS, "json")).read_text())["data"] == {"b": 2}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "other"):
        store = Store(tmp_path / name)
        store.save("gram", FIELDS, {"b": torch.ones(2), "a": torch.zeros(3)})
        files.append(Path(store.path("gram", FIELDS, "safetensors")).read_bytes())
    assert files[0] == files[1]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


# what is done to the bytes of an artifact; None: a folder with something in it takes its place
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-8],
    "cut to its head": lambda content: content[:200],
    "longer": lambda content: content + b"\0",
    "the first bit": lambda content: flipped(content, 0),
    "a bit of the checksum": lambda content: flipped(content, content.index(b"sha256") + 20),
    "a bit of a name": lambda content: flipped(content, content.index(b"value")),
    "a bit in the middle": lambda content: flipped(content, len(content) // 2),
    "the last bit": lambda content: flipped(content, len(content) - 2),
    "of no checksum": lambda content: b"x" * 5000,
    "a folder": lambda content: None,
}


def damage(path: Path, how: str) -> None:
    content = DAMAGES[how](path.read_bytes())
    path.unlink()
    if content is None:
        (path / "inside").mkdir(parents=True)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_what_is_damaged_is_removed_said_and_absent(
    suffix: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def save(store: Store) -> None:
        if suffix == "json":
            store.save_json("gram", FIELDS, {"value": list(range(900))})
        else:
            store.save("gram", FIELDS, {"value": torch.ones(100), "more": torch.zeros(400)})

    store = Store(tmp_path)
    save(store)
    path = Path(store.path("gram", FIELDS, suffix))
    whole = path.read_bytes()
    damage(path, how)
    # the one that wrote it sees that it has changed, as does one that has never seen it
    for found in (store, Store(tmp_path)):
        caplog.clear()
        assert not found.has("gram", FIELDS, suffix)
        assert not path.exists()
        (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert str(path) in said and "is damaged" in said and "made again" in said
        save(found)
        assert path.read_bytes() == whole and found.has("gram", FIELDS, suffix)
        damage(path, how)
    # one that is loaded without asking first
    with pytest.raises(StoreError, match="run again") as error:
        Store(tmp_path).load_json("gram", FIELDS) if suffix == "json" else Store(tmp_path).load("gram", FIELDS)
    assert str(path) in str(error.value) and not path.exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for load, suffix in ((store.load, "safetensors"), (store.load_json, "json")):
        with pytest.raises(StoreError, match="is missing") as error:
            load("gram", FIELDS)
        assert store.path("gram", FIELDS, suffix) in str(error.value)


def test_damage_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.ones(2)})
    damage(Path(store.path("gram", FIELDS, "safetensors")), "cut off")

    def unlink(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(StoreError, match=r"is damaged.*delete it.*Permission denied"):
        store.has("gram", FIELDS)


def test_a_file_is_read_for_its_checksum_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = stores._damage

    def counted(path: str) -> str | None:
        read.append(path)
        return original(path)

    monkeypatch.setattr(stores, "_damage", counted)
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"units.0": torch.ones(2), "left": torch.zeros(9)})
    assert store.has("gram", FIELDS) and store.load("gram", FIELDS, prefix="units.").keys() == {"units.0"}
    assert read == [], "it wrote that file itself"
    other = Store(tmp_path)
    assert other.has("gram", FIELDS) and other.has("gram", FIELDS)
    assert other.load("gram", FIELDS, prefix="units.").keys() == {"units.0"} and other.load("gram", FIELDS)
    assert read == [store.path("gram", FIELDS, "safetensors")]


def test_a_checksum_is_computed_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of another size, which end within the data, give the same checksum."""
    files = []
    for piece in (1 << 20, 777):
        monkeypatch.setattr(stores, "_PIECE", piece)
        store = Store(tmp_path / str(piece))
        store.save("gram", FIELDS, {"value": torch.arange(5000)})
        assert Store(store.directory).has("gram", FIELDS)
        files.append(Path(store.path("gram", FIELDS, "safetensors")).read_bytes())
    assert files[0] == files[1]


def test_no_path_is_made_of_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a `Path` is interned, and the interpreter's table of these grows with thousands of names."""
    made: list[str] = []
    new, joined = Path.__new__, Path.__truediv__

    def made_new(cls: type[Path], *parts: Any, **options: Any) -> Path:
        made.append(str(parts[-1]))
        return new(cls, *parts, **options)

    def made_by_joining(self: Path, name: str) -> Path:
        made.append(name)
        return joined(self, name)

    store = Store(tmp_path)
    monkeypatch.setattr(Path, "__new__", made_new)
    monkeypatch.setattr(Path, "__truediv__", made_by_joining)
    assert Path("new") / "joined" and made == ["new", "joined"]
    made.clear()
    store.save("gram", FIELDS, {"value": torch.ones(2)})
    store.save_json("gram", FIELDS, {"value": 2})
    for other in (store, Store(tmp_path)):
        assert other.has("gram", FIELDS) and other.has("gram", FIELDS, "json") and not other.has("gram", {})
        assert other.load("gram", FIELDS).keys() == {"value"} and other.load_json("gram", FIELDS) == {"value": 2}
    store.remove("gram", FIELDS)
    assert made == []


def test_plain_safetensors_reads_an_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.arange(5)})
    assert torch.equal(load_file(store.path("gram", FIELDS, "safetensors"))["value"], torch.arange(5))


def test_what_killed_writers_left_is_tidied_away_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("gram", FIELDS, {"value": torch.ones(2)})
    store.save_json("plan", FIELDS, [1])
    kept = [path for path in tmp_path.rglob("*.*") if path.is_file()]
    others = [tmp_path / ".hidden", tmp_path / "gram" / ".notes", tmp_path / "plan" / "mine.json"]
    for path in others:
        path.write_text("mine")
    for path in kept:
        for handle, name in (tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.") for _ in range(3)):
            os.close(handle)
            assert Path(name).exists()
    store.tidy()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept + others)


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
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [Path(store.path("gram", FIELDS, "safetensors")).name]


def test_opening_a_store_writes_nothing(tmp_path: Path) -> None:
    assert not Store(tmp_path / "work").has("gram", FIELDS)
    assert not list(tmp_path.iterdir())
