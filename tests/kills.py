"""A program that kills itself: runs that end at their n-th write, in processes forked off one that has imported it all.

python tests/kills.py, with one JSON object on stdin: {"model", "text", "folder", "recipes": {name: settings}, "chain"}.
Of each recipe: `folder/NAME/undisturbed`, a run that nothing ended; then runs that send themselves SIGKILL right before
or right after they rename their n-th file, n = 1, 2, 4, … until one of them ends by itself. With `chain` each goes on
with what the one before it left (`folder/NAME/killed`); without it each begins with nothing (`folder/NAME/AT-WHEN`) and
the same run again, which nothing ends, goes on. Prints {name: [[n, when], …]}, the runs that were killed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by every run
from transformers import AutoTokenizer  # noqa: F401

import spectrim.methods  # noqa: F401
from spectrim import pipeline
from spectrim.core import store
from spectrim.learn.training import Trainer
from spectrim.methods import soco

MOMENTS = ("before", "after")
MOST = 1 << 12  # writes: far more than any run here makes


def kill() -> None:
    """End this process as nothing can prevent or notice."""
    os.kill(os.getpid(), signal.SIGKILL)


def killing(at: int, when: str) -> Callable[[str | Path, Callable[[str], None]], None]:
    """`write_atomically` that ends the process right before or after the rename of the file that is its `at`-th."""
    original, count = store.write_atomically, 0

    def write_atomically(path: str | Path, write: Callable[[str], None]) -> None:
        nonlocal count
        count += 1

        def write_and_die(temporary: str) -> None:
            write(temporary)
            kill()

        original(path, write_and_die if count == at and when == "before" else write)
        if count == at:
            kill()

    return write_atomically


def forked(action: Callable[[], object]) -> int:
    """The exit code of a copy of this process that only does that; −9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(asked: dict[str, Any], recipe: str, settings: Sequence[str], out: Path, end: tuple[int, str] | None) -> bool:
    """One run, killed at `end`; whether it ended by itself. Raises RuntimeError if it failed."""

    def compress() -> None:
        soco.Trainer = functools.partial(Trainer, every=3)  # type: ignore[misc, assignment]
        if end is not None:
            store.write_atomically = killing(*end)  # type: ignore[assignment]
        options: dict[str, Any] = {"sequences": 8, "length": 24, "settings": settings}
        pipeline.compress(asked["model"], recipe, ratio=0.3, text=asked["text"], out=out, **options)

    code = forked(compress)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{recipe}, killed at {end}, ended with code {code}")
    return code == 0


def ends() -> Iterator[tuple[int, str]]:
    """Where runs are killed: before and after the first write, the second, the fourth, …"""
    at = 1
    while at < MOST:
        yield from ((at, when) for when in MOMENTS)
        at *= 2


def killed(asked: dict[str, Any], recipe: str, settings: Sequence[str]) -> list[tuple[int, str]]:
    """All runs of a recipe, and those of them that were killed."""
    folder = Path(asked["folder"]) / recipe
    found: list[tuple[int, str]] = []
    folder.mkdir(parents=True)
    if not run(asked, recipe, settings, folder / "undisturbed", None):
        raise RuntimeError(f"{recipe} was killed by something else")
    for end in ends():
        out = folder / ("killed" if asked["chain"] else f"{end[0]}-{end[1]}")
        if run(asked, recipe, settings, out, end):
            return found
        found.append(end)
        if not asked["chain"] and not run(asked, recipe, settings, out, None):
            raise RuntimeError(f"{recipe} was killed by something else")
    raise RuntimeError(f"{recipe} makes more than {MOST} writes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    print(json.dumps({name: killed(request, name, settings) for name, settings in request["recipes"].items()}))
