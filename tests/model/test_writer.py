"""Safetensors written a tensor at a time are those that the library writes; directories appear whole or not at all."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spectrim.core import heap
from spectrim.model import writer
from spectrim.model.writer import Item


def item(**tensors: Tensor) -> Item:
    return Item({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, lambda: tensors)


def write(directory: Path, items: list[Item], shard_bytes: int = 10**9) -> list[Path]:
    return writer.write_shards(directory, items, shard_bytes, lambda done, total: None)


def test_tensors_of_all_kinds_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd": torch.arange(7, dtype=torch.int8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "part": torch.randn(4, 6)[:, 1:3],
        "none": torch.zeros(0),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "index": torch.arange(5, dtype=torch.int32),
        "gradient": torch.nn.Parameter(torch.randn(3)),
    }
    (file,) = write(tmp_path, [item(**{name: tensor}) for name, tensor in tensors.items()])
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [item(a=torch.zeros(3, dtype=torch.int8)), item(b=torch.zeros(2, dtype=torch.float64))])
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert (8 + size + header["b"]["data_offsets"][0]) % 8 == 0
    assert len(content) == 8 + size + 16 + 3


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    items = [item(**{f"t{i}": torch.full((8,), float(i))}) for i in range(5)]
    seen: list[tuple[int, int]] = []
    files = writer.write_shards(tmp_path, items, 70, lambda done, total: seen.append((done, total)))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 160}
    for i in range(5):
        assert load_file(tmp_path / index["weight_map"][f"t{i}"])[f"t{i}"].tolist() == [i] * 8
    assert seen == [(32 * i, 160) for i in range(1, 6)]


def test_an_item_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    files = write(tmp_path, [item(a=torch.zeros(1)), item(b=torch.zeros(100)), item(c=torch.zeros(1))], 50)
    assert [sorted(load_file(file)) for file in files] == [["a"], ["b"], ["c"]]


def test_tensors_are_made_one_item_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def lazily(name: str) -> Item:
        def make() -> dict[str, Tensor]:
            made.append(name)
            return {name: torch.ones(2)}

        return Item({name: (torch.float32, (2,))}, make)

    progress: list[list[str]] = []
    writer.write_shards(tmp_path, [lazily("a"), lazily("b")], 10**9, lambda done, total: progress.append(list(made)))
    assert progress == [["a"], ["a", "b"]]


@pytest.mark.parametrize("made", [{"a": torch.zeros(3)}, {"a": torch.zeros(2).half()}, {"b": torch.zeros(2)}, {}])
def test_an_item_that_gives_something_else_is_an_error(tmp_path: Path, made: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="are not of the shapes said before"):
        write(tmp_path, [Item({"a": (torch.float32, (2,))}, lambda: made)])


def test_what_a_large_item_was_made_of_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(heap, "give_back", lambda: events.append("given back"))

    def item(name: str, numbers: int) -> Item:
        def make() -> dict[str, Tensor]:
            events.append(name)
            return {name: torch.ones(numbers)}

        return Item({name: (torch.float32, (numbers,))}, make)

    writer.write_shards(tmp_path, [item("a", 8), item("b", 2**18), item("c", 2**19)], 2**30, lambda done, total: None)
    assert events == ["a", "b", "given back", "c", "given back"]


def test_a_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with writer.new_directory(out, overwrite=False) as directory:
        (directory / "file").write_text("new")
        assert not out.exists()
    assert (out / "file").read_text() == "new"
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException, old: bool) -> None:
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "file").write_text("old")
    with pytest.raises(type(error)), writer.new_directory(out, overwrite=True) as directory:
        (directory / "file").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if old else [])
    assert not old or (out / "file").read_text() == "old"


def test_a_filled_directory_is_replaced_whole_or_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with writer.new_directory(out, overwrite=False) as directory:
        (directory / "a").write_text("first")
    with (
        pytest.raises(ValueError, match="is not empty; nothing was changed"),
        writer.new_directory(out, overwrite=False),
    ):
        raise AssertionError("entered")
    assert (out / "a").read_text() == "first"
    with writer.new_directory(out, overwrite=True) as directory:
        (directory / "b").write_text("second")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_place_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a file; give a directory"):
            writer.refuse_filled(tmp_path / "out", overwrite)


def test_a_failure_at_the_very_end_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"), writer.new_directory(out, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "old"
