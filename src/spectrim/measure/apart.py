"""compress() in a process of its own: its peak memory is its own, and running out of memory ends it alone.

The process is forked off a server that has imported the package and holds nothing else, so that it starts at once and
small. A program started afresh would take minutes of imports over many cells, and on Linux would be charged with the
high-water mark of the process that started it.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from spectrim import pipeline
from spectrim.core import heap
from spectrim.core.progress import Progress


@dataclass(frozen=True)
class Compressed:
    """Of a run that ended well: `Result.summary`, seconds of the call, and the process's high-water marks in bytes.

    peak_memory_bytes: of resident memory, the interpreter and the libraries included; device_memory_bytes: of what
    torch had allocated on a GPU, None on a CPU.
    """

    summary: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    device_memory_bytes: int | None


def compress(options: Mapping[str, Any], progress: Progress) -> Compressed:
    """`pipeline.compress(**options)` with a directory to write; options must be picklable.

    Raises RuntimeError with type and message of what was raised there, or with how the process was ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, dict(options), torch.get_num_threads()))
    process.start()
    send.close()
    try:
        while True:
            kind, *content = receive.recv()
            if kind != "progress":
                break
            progress(*content)
    except EOFError:
        process.join()
        raise RuntimeError(_ending(process.exitcode)) from None
    finally:
        if sys.exc_info()[0] is not None:
            process.terminate()
        process.join()
        receive.close()
    if kind == "error":
        raise RuntimeError(content[0])
    return Compressed(*content)


def _child(send: Connection, options: Mapping[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    device = torch.device(options["device"])
    started = time.perf_counter()
    try:
        made = pipeline.compress(**options, progress=lambda *step: send.send(("progress", *step)))
    except KeyboardInterrupt:
        return  # who asked was interrupted too
    except Exception as error:
        send.send(("error", f"{type(error).__name__}: {error}"))
        return
    seconds = time.perf_counter() - started
    on_device = None if device.type != "cuda" else torch.cuda.max_memory_allocated(device)
    send.send(("done", made.summary, seconds, heap.peak(), on_device))


def _ending(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "the compressing process was killed: most likely it ran out of memory"
    return f"the compressing process ended without a result, exit code {code}"
