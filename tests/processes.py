"""Two processes of gloo that compress together, and one that does the same alone, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import spectrim

SOURCE = str(Path(spectrim.__file__).parents[1])

# What a process does: every run of runs.json, together with the others.
RUNS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import spectrim

torch.set_num_threads(1)
folder = Path(sys.argv[1])
windows = load_file(folder / "windows.safetensors")["ids"]
for run in json.loads((folder / "runs.json").read_text()):
    made = spectrim.compress(run.pop("model"), run.pop("recipe"), text=run.pop("text", windows), **run)
    assert made.directory is not None and (made.directory / "spectrim.json").exists()
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def started(arguments: Sequence[str], world: int = 2, **more: str) -> list[subprocess.Popen[str]]:
    """Python programs, as torchrun starts them."""
    common = {
        **os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more,
        "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip


def ended(running: Sequence[subprocess.Popen[str]], seconds: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, standard output and errors of each, once all have ended; none outlives this."""
    try:
        said = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def compressed_together(folder: Path, runs: Sequence[Mapping[str, Any]], world: int = 2) -> None:
    """Run `spectrim.compress` for each of `runs` in several processes; `folder` has the windows."""
    (folder / "runs.json").write_text(json.dumps(list(runs), default=str), encoding="utf-8")
    (folder / "script.py").write_text(RUNS, encoding="utf-8")
    found = ended(started([str(folder / "script.py"), str(folder)], world))
    assert all(code == 0 for code, _, _ in found), [errors for _, _, errors in found]
