"""What killed processes leave beside an output: the next one tidies up, and touches nothing that lives."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spectrim.core import lock
from spectrim.core.store import StoreError
from spectrim.model import writer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], object]) -> None:
    """Do it in a copy of this process that is to end by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def killed_while_writing(out: Path) -> None:
    def write() -> None:
        with writer.new_directory(out, overwrite=True) as directory:
            (directory / "file").write_text("half")
            die()

    killed(write)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written(out: Path, content: str, overwrite: bool = False) -> None:
    with writer.new_directory(out, overwrite) as directory:
        (directory / "file").write_text(content)


def test_what_a_killed_process_wrote_is_removed_by_the_next_into_the_same_output(tmp_path: Path) -> None:
    for name in ("out", "out.b", "other"):
        killed_while_writing(tmp_path / name)
    left = names(tmp_path)
    assert len(left) == 3 and not (tmp_path / "out").exists()
    writer.refuse_filled(tmp_path / "out", overwrite=False)
    others = [name for name in left if name.startswith((".out.b.", ".other."))]
    assert names(tmp_path) == others and len(others) == 2
    killed_while_writing(tmp_path / "out")
    written(tmp_path / "out", "whole")
    assert names(tmp_path) == [*others, "out"] and (tmp_path / "out" / "file").read_text() == "whole"


def test_what_a_process_that_died_between_the_renames_had_moved_away_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out, "old")
    rename = Path.rename

    def rename_and_die(self: Path, target: Path) -> Path:
        rename(self, target)
        die()
        return target

    def replace() -> None:
        Path.rename = rename_and_die  # type: ignore[assignment, method-assign]
        written(out, "new", overwrite=True)

    killed(replace)
    assert not out.exists()
    with pytest.raises(ValueError, match="is not empty"):
        writer.refuse_filled(out, overwrite=False)
    assert names(tmp_path) == ["out"] and (out / "file").read_text() == "old"


@pytest.mark.parametrize("old", [False, True])
def test_what_a_process_replaced_that_died_right_after_is_removed(old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if old:
        written(out, "old")

    def replace() -> None:
        writer._clear = lambda place, out: die()  # type: ignore[assignment]
        written(out, "new", overwrite=True)

    killed(replace)
    assert len(names(tmp_path)) == 2
    writer.settle(out)
    assert names(tmp_path) == ["out"] and (out / "file").read_text() == "new"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer.new_directory(out, overwrite=False) as first:
        (first / "file").write_text("first")
        writer.settle(out)
        written(out, "second")
        assert (first / "file").read_text() == "first" and len(names(tmp_path)) == 2
        (out / "file").unlink()
        out.rmdir()
    assert names(tmp_path) == ["out"] and (out / "file").read_text() == "first"


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    killed_while_writing(tmp_path / "out")
    written(tmp_path / "out", "whole")
    assert len(names(tmp_path)) == 2, "the leftover could be another machine's, at work"
    (left,) = [path for path in tmp_path.iterdir() if path.name != "out"]
    (left / lock.NAME).touch()
    writer.settle(tmp_path / "out")
    assert (left / "new" / "file").read_text() == "half"


def test_only_names_that_are_ours_are_touched(tmp_path: Path) -> None:
    for name in (
        ".out.partial",
        ".out.abcdefg.partial",
        ".out.abcdefgh",
        ".out.ABCDEFGH.partial",
        ".outxabcdefgh.partial",
    ):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    (tmp_path / ".out.abcdefgh.partial").mkdir()  # killed before it was locked
    writer.settle(tmp_path / "out")
    assert names(tmp_path) == before


def test_a_place_that_another_process_is_just_removing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tried = lock.held, 0

    @contextmanager
    def held(directory: Path, option: str) -> Iterator[bool]:
        nonlocal tried
        tried += 1
        if tried < 3:
            directory.rmdir()
            raise StoreError("in use")
        with original(directory, option) as alone:
            yield alone

    monkeypatch.setattr(lock, "held", held)
    written(tmp_path / "out", "whole")
    assert names(tmp_path) == ["out"] and tried == 3


def test_what_cannot_be_removed_is_said_and_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(writer.shutil, "rmtree", refuse)
    written(tmp_path / "out", "whole")
    assert (tmp_path / "out" / "file").read_text() == "whole" and "Permission denied" in caplog.text
    monkeypatch.undo()
    writer.settle(tmp_path / "out")
    assert names(tmp_path) == ["out"]
