"""The lock of a directory: one run at a time, the owner named, nothing left behind by the dead or the done."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spectrim.core import distributed, lock
from spectrim.core.lock import held
from spectrim.core.store import StoreError

# holds the lock until it reads a line
OWNER = f"""
import sys
sys.path.insert(0, {str(Path(lock.__file__).parents[2])!r})
from pathlib import Path
from spectrim.core.lock import held
sys.argv = ["spectrim", "compress", "a model"]
with held(Path({{directory!r}})):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def owner(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a directory."""
    command = [sys.executable, "-c", OWNER.format(directory=str(directory))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_second_process_is_refused_and_the_first_named_until_it_is_killed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with owner(work) as process:
        (work / "kind").mkdir()
        with pytest.raises(StoreError) as error, held(work):
            pytest.fail("two hold it")
        said = str(error.value)
        assert str(work) in said and f"process {process.pid} on {socket.gethostname()} since 2" in said
        assert "spectrim compress 'a model'" in said and "Wait until" in said and "--work" in said
        with pytest.raises(StoreError, match="--out"), held(work, "--out"):
            pytest.fail("two hold it")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (work / lock.NAME).exists(), "who is killed cannot remove it"
        with held(work) as alone:
            assert alone and json.loads((work / lock.NAME).read_text())["pid"] == os.getpid()
    assert [path.name for path in work.iterdir()] == ["kind"]


def test_two_of_one_process_are_two(tmp_path: Path) -> None:
    with held(tmp_path):
        for _ in range(2):
            with pytest.raises(StoreError, match=f"process {os.getpid()} "), held(tmp_path):
                pytest.fail("two hold it")
    with held(tmp_path) as alone:
        assert alone


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_it_ends_with_an_error_and_leaves_no_empty_directory(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.NAME).exists()
        raise failure
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "made").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["made"]
    (tmp_path / "there").mkdir()
    with held(tmp_path / "there"):
        pass
    assert (tmp_path / "there").exists(), "it was there before"


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner before removes the file between our opening it and our locking it."""
    original, opened = lock._open, 0

    def open_and_lose(path: Path, option: str) -> int | None:
        nonlocal opened
        opened += 1
        handle = original(path, option)
        if opened < 3:
            path.unlink()
        return handle

    monkeypatch.setattr(lock, "_open", open_and_lose)
    with held(tmp_path) as alone:
        assert alone and opened == 3
        monkeypatch.setattr(lock, "_open", original)
        with pytest.raises(StoreError, match="in use"), held(tmp_path):
            pytest.fail("two hold it")


def test_a_lock_that_is_not_signed_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_sign", lambda handle: None)
    monkeypatch.setattr(lock, "_TRIES", 2)
    with held(tmp_path), pytest.raises(StoreError, match="another process, which has not signed"), held(tmp_path):
        pytest.fail("two hold it")


def test_the_first_of_several_processes_holds_it_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path) as first:
        assert first
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        with held(tmp_path) as second:
            assert not second
        assert (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_it_goes_on_and_says_so(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, how: int) -> None:
        assert code is not None
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
    with held(tmp_path) as alone:
        assert not alone
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(tmp_path) in said and "cannot be locked" in said and "no second run" in said
    assert not list(tmp_path.iterdir())


def test_other_failures_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"cannot use .*--work"), held(place):
            pytest.fail("there is no directory")
    before: Any = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else None
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(StoreError, match="Input/output error"), held(tmp_path):
        pytest.fail("it is not locked")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == len(before), "the file is closed"
