"""What `spectrim plan --time` predicts against what runs then take: memory, disk, and time, on generated Llamas.

Each model has a process of its own, which plans, then runs with the same settings, and watches the work directory while
it does. Figures are measured over predicted; of memory what the run holds beyond its imports,
which a run on a tiny model makes before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common, memory
from benchmarks.common import Bound, Case

RATIO = 0.2
THREADS = 1
TOKENS = (16, 256)
TINY = {
    **memory.NARROW, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 256,
}  # fmt: skip
SHAPES = {
    "hidden 512, 4 blocks": {
        **memory.NARROW, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192,
    },
    "hidden 1024, 3 blocks": {**memory.NARROW, "num_hidden_layers": 3, "vocab_size": 8192},
}  # fmt: skip
RECIPES = ("whitened", "svd")
BOUNDS = {
    "memory": (Bound("at least", 1 / 1.2), Bound("at most", 1.2)),
    "disk": (Bound("at least", 1 / 1.2), Bound("at most", 1.2)),
    "time": (Bound("at least", 0.5), Bound("at most", 2.0)),
}


class Watch(threading.Thread):
    """The largest size that a directory had, asked for every hundredth of a second."""

    def __init__(self, directories: list[Path]):
        super().__init__(daemon=True)
        self.directories, self.largest, self.over = directories, 0, threading.Event()

    def run(self) -> None:
        """Look until told that it is over."""
        while not self.over.wait(0.01):
            self.largest = max(self.largest, sum(map(_size, self.directories)))


def _size(directory: Path) -> int:
    found = 0
    for path in directory.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # gone meanwhile: what it was replaced by counts
            continue
    return found


def child(model: Path, recipe: str, limit: str | None, threads: int, report: Path) -> None:
    """Plan and run in this process; writes what was predicted and what was measured."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run

    import spectrim.methods  # noqa: F401
    from spectrim import pipeline
    from spectrim import recipe as recipes
    from spectrim.estimate import estimate

    torch.set_num_threads(threads)
    asked = recipes.build(recipe, {"ratio": RATIO, "sequences": TOKENS[0], "length": TOKENS[1]}, ["calibrate.batch=4"])
    ids = torch.randint(100, TOKENS, generator=torch.Generator().manual_seed(0))
    # in another process: its peak must not be this one's
    planned = json.loads((report.parent / "plan.json").read_text(encoding="utf-8"))
    if not planned:
        found = estimate(model, asked, memory=limit, time=True).to_json()
        common.write(report.parent / "plan.json", found)
        return
    # what a first run imports, too
    first = model.parent / "first"
    pipeline.compress(first, recipe, RATIO, ids[:2, :8] % 256, out=model.parent / "first-compressed")
    before, work, out = common.peak_bytes(), model.parent / "work", model.parent / "compressed"
    watch = Watch([work])
    watch.start()
    start = time.perf_counter()
    made = pipeline.compress(model, asked, text=ids, out=out, work=work, memory=limit)
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    content = {"memory": common.peak_bytes() - before, "disk": watch.largest, "seconds": seconds, "imports": before}
    common.write(report, {**content, "output": _size(out), "timings": made.run["timings"]})


def cases(shape: dict[str, Any], name: str, recipe: str, limit: str | None) -> list[Case]:
    """Measured over predicted of one run: memory, disk and time."""
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        (model := Path(folder) / "dense").mkdir()
        (first := Path(folder) / "first").mkdir()
        memory.generate(model, shape)
        memory.generate(first, TINY)
        report = Path(folder) / "report.json"
        common.write(Path(folder) / "plan.json", {})
        arguments = ["--model", str(model), "--recipe", recipe, *(["--limit", limit] if limit else [])]
        for _ in ("plan", "run"):
            common.run_module("predict", str(report), *arguments, threads=THREADS)
        planned = json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))
        measured = json.loads(report.read_text(encoding="utf-8"))
    stages = planned["stages"]
    guessed = {
        "memory": max(sum(stage["memory_bytes"].values()) for stage in stages.values()),
        "disk": stages["decompose"]["disk_bytes"] - planned["disk_bytes"].get("windows", 0),
        "time": sum(planned["seconds"].values()),
    }
    # given token windows are not stored; a run without statistics has none anyway
    found = {"memory": measured["memory"], "disk": measured["disk"], "time": measured["seconds"]}
    details = {"predicted": {**planned, "targets": None}, "measured": measured}
    title = f"{name}, {recipe}" + (f", --memory {limit}" if limit else "")
    return [
        Case(f"{title}: {what}, {bound.side}", (found[what] / guessed[what],), THREADS, "ratio", bound, details)
        for what, bounds in BOUNDS.items()
        for bound in bounds
    ]


def measure() -> dict[str, object]:
    """Two sizes and two recipes; one of them with a limit on memory."""
    made = []
    for name, shape in SHAPES.items():
        for recipe in RECIPES:
            made += cases(shape, name, recipe, None)
    made += cases(SHAPES["hidden 512, 4 blocks"], "hidden 512, 4 blocks", "whitened", "96MB")
    settings = {"ratio": RATIO, "windows": list(TOKENS), "batch": 4, "stored": "bfloat16"}
    return common.result("predict", made, settings)


def main() -> None:
    """Measure everything, or, with --model, be the process that plans or runs."""
    parser = argparse.ArgumentParser(description="Predictions of `plan --time` against runs.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint: only plan or run it in this process")
    parser.add_argument("--recipe", default="whitened")
    parser.add_argument("--limit")
    asked = parser.parse_args()
    if asked.model is None:
        common.write(asked.report, measure())
    else:
        child(asked.model, asked.recipe, asked.limit, THREADS, asked.report)


if __name__ == "__main__":
    main()
