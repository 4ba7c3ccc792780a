"""What `spectrim plan --time` predicts against what runs then take: memory, disk, and time, on generated Llamas.

Plan and run are processes of their own with the same settings; the one that runs watches the work directory. Figures
are measured over predicted; of memory what the run holds beyond its imports, which a run on a tiny model makes before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, memory
from benchmarks.common import Bound, Case

RATIO = 0.2
THREADS = 1
TOKENS, BATCH = (16, 256), 4
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


@dataclass(frozen=True)
class Asked:
    """A run: recipe, limit on memory, sequences × length, windows of a batch, seconds between two looks at the disk."""

    recipe: str
    limit: str | None = None
    tokens: tuple[int, int] = TOKENS
    batch: int = BATCH
    look: float = 0.01

    def arguments(self) -> list[str]:
        """As the child takes them."""
        limit = [] if self.limit is None else ["--limit", self.limit]
        sizes = ["--tokens", *map(str, self.tokens), "--batch", str(self.batch), "--look", str(self.look)]
        return ["--recipe", self.recipe, *limit, *sizes]


class Watch(threading.Thread):
    """The largest size that a directory had, asked for again and again."""

    def __init__(self, directory: Path, look: float):
        super().__init__(daemon=True)
        self.directory, self.look, self.largest, self.over = directory, look, 0, threading.Event()

    def run(self) -> None:
        """Look until told that it is over."""
        while not self.over.wait(self.look):
            self.largest = max(self.largest, _size(self.directory))


def _size(directory: str | Path) -> int:
    """Bytes of the files below a directory, which may come and go meanwhile.

    By entries, not by `rglob`: that keeps the path of every file it has seen until its end, in the process whose memory
    is measured, a kilobyte for each.
    """
    try:
        entries = os.scandir(directory)
    except FileNotFoundError:
        return 0
    with entries:
        return sum(map(_size_of, entries))


def _size_of(entry: os.DirEntry[str]) -> int:
    try:
        return _size(entry.path) if entry.is_dir(follow_symlinks=False) else entry.stat().st_size
    except FileNotFoundError:  # what it was replaced by counts
        return 0


def child(model: Path, of: Asked, plan: bool, report: Path) -> None:
    """Plan or run in this process; writes what was predicted, or what was measured."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  would else be imported by the run

    import spectrim.methods  # noqa: F401
    from spectrim import pipeline
    from spectrim import recipe as recipes
    from spectrim.estimate import estimate

    torch.set_num_threads(THREADS)
    imports = common.peak_bytes()
    sizes = {"ratio": RATIO, "sequences": of.tokens[0], "length": of.tokens[1]}
    asked = recipes.build(of.recipe, sizes, [f"calibrate.batch={of.batch}"])
    if plan:
        common.write(report, estimate(model, asked, memory=of.limit, time=True).to_json())
        return
    ids = torch.randint(100, of.tokens, generator=torch.Generator().manual_seed(0))
    # what a first run imports, too
    pipeline.compress(model.parent / "first", of.recipe, RATIO, ids[:2, :8], out=report.parent / "first-compressed")
    before, work, out = common.peak_bytes(), report.parent / "work", report.parent / "compressed"
    watch = Watch(work, of.look)
    watch.start()
    start = time.perf_counter()
    made = pipeline.compress(model, asked, text=ids, out=out, work=work, memory=of.limit)
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    content = {"memory": common.peak_bytes() - before, "disk": watch.largest, "seconds": seconds, "before": before}
    until = {stage: peak - imports for stage, peak in made.run["peak_rss_bytes_until"].items()}
    over = {"peak_over_imports": common.peak_bytes() - imports, "peak_over_imports_until": until}
    common.write(report, {**content, **over, "output": _size(out), "timings": made.run["timings"]})


MORE = (Asked("whitened", "96MB"), Asked("spectrim"), Asked("spectrim-input", "160MB"))


def compared(model: Path, of: Asked) -> dict[str, dict[str, Any]]:
    """What was predicted of a run, and what it took. `first`, a tiny model, lies beside the model."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        for name, more in (("predicted", ["--plan"]), ("measured", [])):
            report = Path(folder) / f"{name}.json"
            common.run_module("predict", str(report), "--model", str(model), *of.arguments(), *more, threads=THREADS)
            found[name] = json.loads(report.read_text(encoding="utf-8"))
    return found


def cases_of(title: str, predicted: dict[str, Any], measured: dict[str, Any]) -> list[Case]:
    """Measured over predicted: memory, disk and time."""
    stages = predicted["stages"]
    guessed = {
        "memory": max(sum(stage["memory_bytes"].values()) for stage in stages.values()),
        # the output lies elsewhere, and given token windows are not stored
        "disk": max(stage["disk_bytes"] for name, stage in stages.items() if name != "write")
        - predicted["disk_bytes"].get("windows", 0),
    }
    if None not in predicted["seconds"].values():  # not where plans are tried on the model
        guessed["time"] = sum(predicted["seconds"].values())
    found = {"memory": measured["memory"], "disk": measured["disk"], "time": measured["seconds"]}
    details = {"predicted": {**predicted, "targets": None}, "measured": measured}
    return [
        Case(f"{title}: {what}, {bound.side}", (found[what] / guessed[what],), THREADS, "ratio", bound, details)
        for what in guessed
        for bound in BOUNDS[what]
    ]


def generated(folder: Path, shape: dict[str, Any]) -> tuple[Path, int]:
    """A model and, beside it, the tiny one; its directory and how many parameters it has."""
    (model := folder / "dense").mkdir()
    (first := folder / "first").mkdir()
    memory.generate(first, TINY)
    return model, memory.generate(model, shape)


def cases(shape: dict[str, Any], name: str, runs: Sequence[Asked]) -> list[Case]:
    """Runs on one model."""
    made = []
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        model, _ = generated(Path(folder), shape)
        for of in runs:
            title = f"{name}, {of.recipe}" + (f", --memory {of.limit}" if of.limit else "")
            made += cases_of(title, **compared(model, of))
    return made


def measure() -> dict[str, object]:
    """Two sizes and two recipes; at the smaller one also our own, and limits on memory."""
    made = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        runs = [Asked(recipe) for recipe in RECIPES]
        made += cases(shape, name, runs if number else [*runs, *MORE])
    settings = {"ratio": RATIO, "windows": list(TOKENS), "batch": BATCH, "stored": "bfloat16"}
    return common.result("predict", made, settings)


def main() -> None:
    """Measure everything, or, with --model, be the process that plans or runs."""
    parser = argparse.ArgumentParser(description="Predictions of `plan --time` against runs.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint: only plan or run it in this process")
    parser.add_argument("--recipe", default="whitened")
    parser.add_argument("--plan", action="store_true", help="only plan it")
    parser.add_argument("--limit")
    parser.add_argument("--tokens", type=int, nargs=2, default=TOKENS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--look", type=float, default=Asked.look)
    asked = parser.parse_args()
    if asked.model is None:
        common.write(asked.report, measure())
    else:
        of = Asked(asked.recipe, asked.limit, tuple(asked.tokens), asked.batch, asked.look)
        child(asked.model, of, asked.plan, asked.report)


if __name__ == "__main__":
    main()
