"""Two processes of gloo, with one thread each, against one process with one thread: wall time of a run, imports apart.

A run that decomposition dominates: blocks of hidden 1536, FFN 4096, a few short windows, the recipe `whitened`. Every
run is started by torchrun, in processes of its own, which import everything first and begin when all have. The time is
that of `spectrim.compress`, in the process that takes longest, its meeting the other one included. The two sides take
turns.

The seven matrices of a block cost out · in · min(out, in) each: dealt to two processes the larger share is 0.53 of
them, so half the time cannot be reached here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, memory
from benchmarks.common import Bound, Case

RATIO = 0.2
WITHIN = Bound("at most", 0.6)
WINDOWS = (4, 64)
REPEATS = 5
SHAPE = {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 2048, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def compressed(model: Path, out: Path, windows: tuple[int, int], reports: Path) -> None:
    """One run in this process, alone or with others; writes its seconds, and what it says of its stages, by rank."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run

    import spectrim.methods  # noqa: F401
    from spectrim import pipeline

    torch.set_num_threads(1)
    ids = torch.randint(100, windows, generator=torch.Generator().manual_seed(0))
    _imported(reports)
    start = time.perf_counter()
    made = pipeline.compress(model, "whitened", RATIO, ids, out, settings=["calibrate.batch=1"])
    seconds = time.perf_counter() - start
    common.write(reports / f"{os.environ.get('RANK', '0')}.json", {"seconds": seconds, **made.run})


def _imported(folder: Path) -> None:
    """Tell the other processes of a run, by a file, and wait for them: imports differ by a second.

    Raises TimeoutError where one of them has not come within five minutes.
    """
    (folder / f"{os.environ.get('RANK', '0')}.imported").touch()
    last = time.monotonic() + 300
    while len(list(folder.glob("*.imported"))) < int(os.environ.get("WORLD_SIZE", "1")):
        if time.monotonic() > last:
            raise TimeoutError(f"another process of {folder} did not come")
        time.sleep(0.001)


def run(model: Path, folder: Path, windows: tuple[int, int], processes: int) -> dict[str, Any]:
    """The report of the process that takes longest. Raises CalledProcessError when one fails."""
    (reports := folder / f"reports-{processes}").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "benchmarks.processes", str(reports), "--model", str(model)]
    command += ["--out", str(folder / f"out-{processes}"), "--windows", *map(str, windows)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    subprocess.run(command, cwd=common.ROOT, env={**os.environ, **limits}, check=True)
    found = [json.loads((reports / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    slowest: dict[str, Any] = max(found, key=lambda report: report["seconds"])
    return {**slowest, "stages_of_the_first": found[0]["timings"]}


def case(shape: dict[str, Any], windows: tuple[int, int], repeats: int) -> Case:
    """Seconds of two processes over those of one, turn by turn."""
    turns: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        (model := Path(folder) / "dense").mkdir()
        memory.generate(model, shape)
        for turn in range(repeats):
            for processes, taken in turns.items():
                (own := Path(folder) / f"{turn}-{processes}").mkdir()
                taken.append(run(model, own, windows, processes))
    ratios = tuple(two["seconds"] / one["seconds"] for one, two in zip(turns[1], turns[2], strict=True))
    details = {
        "seconds": {str(n): [round(each["seconds"], 3) for each in taken] for n, taken in turns.items()},
        "stages": {str(n): taken[-1]["stages_of_the_first"] for n, taken in turns.items()},
    }
    name = f"{shape['num_hidden_layers']} blocks, hidden {shape['hidden_size']}, {windows[0]} × {windows[1]} tokens"
    return Case(name, ratios, 1, "two processes / one", WITHIN, details)


def measure() -> dict[str, object]:
    """The generated model, a few times."""
    settings = {"recipe": "whitened", "ratio": RATIO, "windows": list(WINDOWS), **SHAPE}
    return common.result("processes", [case(SHAPE, WINDOWS, REPEATS)], settings)


def main() -> None:
    """Measure everything, or, with --model, be a process that is measured."""
    parser = argparse.ArgumentParser(description="Wall time of two processes over one.")
    parser.add_argument("report", type=Path, help="a file, or with --model a folder")
    parser.add_argument("--model", type=Path, help="a checkpoint: only compress it in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--windows", type=int, nargs=2, default=WINDOWS)
    asked = parser.parse_args()
    if asked.model is None:
        common.write(asked.report, measure())
    else:
        compressed(asked.model, asked.out, tuple(asked.windows), asked.report)


if __name__ == "__main__":
    main()
