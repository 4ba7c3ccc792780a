"""Our own recipes against whitened SVD on one generated model of 106 M parameters: processor seconds.

All calibrate on the same windows, the recipes' own number at the model's full length, decompose every matrix and
write a checkpoint, `whitened` in pivot form too. Each repeat runs all of them in turn; that takes an hour, so one
repeat is the default. `details` has the seconds of each stage: `calibrate` holds both passes of our own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, whole_run
from benchmarks.common import Bound, Case
from spectrim.pipeline import Result, compress

RATIO = 0.2
WITHIN = Bound("at most", 4.0)
BASE = "whitened"
RECIPES = ("spectrim", "spectrim-entries")
SEQUENCES, LENGTH = 128, 512


def measure(
    folder: Path, shape: dict[str, Any], windows: tuple[int, int], recipes: Sequence[str], repeats: int
) -> list[Case]:
    """A case for each recipe: its processor seconds over those of whitened SVD."""
    setting = whole_run.prepare(folder, shape, *windows, 1, 1)
    last: dict[str, Result] = {}

    def run(recipe: str) -> None:
        out = folder / recipe
        for path in (out, Path(f"{out}.work")):
            shutil.rmtree(path, ignore_errors=True)
        last[recipe] = compress(setting.checkpoint, recipe, RATIO, setting.windows, out, format="pivot")

    turns = common.in_turns({name: lambda name=name: run(name) for name in (BASE, *recipes)}, repeats)  # type: ignore[misc]
    cases = []
    for name in recipes:
        details = {
            "seconds": common.medians(turns.processor),
            "stages": {each: last[each].run["timings"] for each in (BASE, name)},
            "parameters": {each: last[each].summary["parameters"]["total_after"] for each in (BASE, name)},
            "notes": list(last[name].plan.notes),
        }
        values = common.ratios(turns.processor, name, [BASE])
        bound = WITHIN if name == "spectrim" else None
        cases.append(Case(f"{name} / {BASE}", values, torch.get_num_threads(), bound=bound, details=details))
    return cases


def main() -> int:
    """Write the result file named by the first argument."""
    torch.set_num_threads(1)
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        cases = measure(Path(folder), whole_run.SHAPE, (SEQUENCES, LENGTH), RECIPES, repeats)
    settings = {"ratio": RATIO, "windows": [SEQUENCES, LENGTH], "shape": whole_run.SHAPE, "format": "pivot"}
    content = common.result("own_recipe", cases, settings)
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
