"""What goes wrong from outside while a run is under way: disks, files that vanish, signals. Nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import spectrim
from spectrim import cli
from spectrim.core.store import Store, StoreError
from spectrim.model.checkpoint import Checkpoint
from tests.conftest import tree_hash

SOURCE = str(Path(spectrim.__file__).parents[1])
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def compress(directory: Path, out: Path, **options: Any) -> spectrim.Result:
    return spectrim.compress(directory, **{"recipe": "svd", "out": out, **options})


def deny(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, error: OSError) -> None:
    """Let a function of tempfile fail in one folder: a test that runs as root can write everywhere."""
    original = getattr(tempfile, name)

    def denied(*args: Any, **options: Any) -> Any:
        if Path(options["dir"]).is_relative_to(folder):
            raise error
        return original(*args, **options)

    monkeypatch.setattr(tempfile, name, denied)


@pytest.mark.parametrize("error", [READ_ONLY, OSError(errno.ENOSPC, "No space left on device")])
def test_an_output_that_cannot_be_written_is_known_before_anything_is_read(
    error: OSError, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(Checkpoint, "__init__", lambda self, directory, *rest: read.append(directory))
    deny(monkeypatch, "mkdtemp", tmp_path, error)
    with pytest.raises(OSError, match=f"cannot write .*out: {error.strerror} .{tmp_path}.; give another .*--out"):
        compress(llama_dir, tmp_path / "not" / "yet" / "out")
    assert not read and not list(tmp_path.iterdir())


def test_a_work_directory_that_cannot_be_written(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, "mkstemp", tmp_path / "out.work", READ_ONLY)
    with pytest.raises(StoreError, match=r"cannot write .*out\.work.*Read-only file system.*another.*--work"):
        compress(llama_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    compress(llama_dir, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_work_file_that_vanishes(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone between the look and the reading: named; the next run makes it again, and the result is the same."""
    compress(llama_dir, tmp_path / "whole")
    original, gone = Store.load, []

    def load(self: Store, kind: str, fields: Any, **options: Any) -> Any:
        if not gone:
            gone.append(self.path(kind, fields, "safetensors"))
            Path(gone[0]).unlink()
        return original(self, kind, fields, **options)

    monkeypatch.setattr(Store, "load", load)
    work = tmp_path / "whole.work"
    with pytest.raises(StoreError) as raised:
        compress(llama_dir, tmp_path / "out", work=work)
    assert gone[0] in str(raised.value) and "run again" in str(raised.value)
    assert not (tmp_path / "out").exists()
    compress(llama_dir, tmp_path / "out", work=work)
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_order(
    number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "err_console", Console(stderr=True, width=200))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tidied = False
    with pytest.raises(typer.Exit) as raised, cli._failures():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            tidied = True
    assert tidied and raised.value.exit_code == code
    assert "no output was written, and finished work is kept" in " ".join(capsys.readouterr().err.split())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_was_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with cli._failures():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_message_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in square brackets are no markup."""
    monkeypatch.setattr(cli, "err_console", Console(stderr=True, width=200))
    with pytest.raises(typer.Exit), cli._failures():
        raise ValueError("no such file: [/red] [bold]a[order].txt")
    assert "error: no such file: [/red] [bold]a[order].txt" in capsys.readouterr().err


WAITING = """
import signal, sys, time
from pathlib import Path
from spectrim.model import writer
from spectrim.cli import app

mark = sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs beside it lets them ignore it
original = writer._write_file

def wait(*args):
    found = original(*args)
    yield next(found)
    Path(mark).write_text("here")
    time.sleep(600)

writer._write_file = wait
app()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_stopped_while_it_writes(number: int, code: int, llama_dir: Path, tmp_path: Path) -> None:
    mark, out = tmp_path / "mark", tmp_path / "here" / "out"
    command = [sys.executable, "-c", WAITING, str(mark), "compress", str(llama_dir), "--out", str(out)]
    command += ["--recipe", "svd"]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not mark.exists() and run.poll() is None:
            time.sleep(0.05)
        assert run.poll() is None and len(list(out.parent.iterdir())) == 2  # the temporary directory, and the work
        run.send_signal(number)
        printed, said = run.communicate(timeout=120)
    assert run.returncode == code and printed == ""
    assert "no output was written, and finished work is kept for the next run" in " ".join(said.split())
    assert [path.name for path in out.parent.iterdir()] == ["out.work"]
    kept = tree_hash(tmp_path / "here" / "out.work")
    assert kept and not [name for name in kept if Path(name).name.startswith(".")]
    compress(llama_dir, out)
    assert (out / "model.safetensors").exists()
    assert tree_hash(tmp_path / "here" / "out.work").items() >= kept.items()
