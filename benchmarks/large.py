"""Runs on generated checkpoints of 1 B and 3 B parameters with a limit on memory, predicted and measured.

Both have blocks of one shape, one three times as many as the other: what a run keeps of each block would show. Tokens
are few, for they only add to every block what they take: hidden states of all windows are above the limit, and lie in
files. Every run and every plan is a process of its own. Figures:

- the peak beside imports over the bound of `memory.py`, with the activations of one batch, and the hidden states that
  the limit leaves room for in memory, and over the limit itself, then beside what a tiny run imports too;
- the peak at three times the blocks over the other one;
- measured over predicted, as in `predict.py`.

python -m benchmarks.large REPORT.json [--recipes whitened unirank] [--blocks 88 264]
The report is written anew after every run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, memory, predict
from benchmarks.common import Bound, Case

RECIPES = ("whitened", "unirank")
BLOCKS = (88, 264)
LIMIT = "300MB"
TOKENS, BATCH = (8, 128), 1
LOOK = 5.0  # seconds between two looks at a work directory of some thousand files
SHAPE = {**memory.NARROW, "num_key_value_heads": 4, "vocab_size": 8192}
WITHIN = Bound("at most", 1.0)
NO_MORE = Bound("at most", 1.05)

Found = dict[str, dict[str, Any]]


def bound_terms(predicted: dict[str, Any]) -> dict[str, int]:
    """What a run has to hold: of `memory.py` with the tokens of a batch, and hidden states below the limit."""
    held = max(stage["memory_bytes"].get("hidden_states", 0) for stage in predicted["stages"].values())
    return {**memory.terms(SHAPE, (BATCH, TOKENS[1]), 4), "hidden_states": held}


def cases_of(recipe: str, blocks: int, parameters: int, found: Found) -> list[Case]:
    """The peak over its bound and over the limit, and what was predicted."""
    from spectrim.needs import parse_size

    terms, peak = bound_terms(found["predicted"]), found["measured"]["peak_over_imports"]
    limits = {"bound": sum(terms.values()), "limit": parse_size(LIMIT)}
    used = {"bound": peak, "limit": found["measured"]["memory"]}
    details = {"parameters": parameters, "peak_over_imports": peak, "bound_terms": terms, **limits}
    name = f"{parameters / 1e9:.2f} B, {blocks} blocks, {recipe}"
    peaks = [
        Case(f"{name}: peak / {what}", (used[what] / size,), predict.THREADS, "ratio", WITHIN, details)
        for what, size in limits.items()
    ]
    return [*peaks, *predict.cases_of(name, **found)]


def growth(recipe: str, peaks: dict[int, int]) -> list[Case]:
    """The peak at most blocks over that at fewest."""
    if len(peaks) < 2:
        return []
    fewest, most = min(peaks), max(peaks)
    name = f"{recipe}: peak at {most} blocks / at {fewest}"
    return [Case(name, (peaks[most] / peaks[fewest],), predict.THREADS, "ratio", NO_MORE, {"peaks": peaks})]


def measure(report: Path, recipes: Sequence[str], blocks: Sequence[int]) -> None:
    """Every recipe on every checkpoint, the fewest blocks first; one checkpoint is on the disk at a time."""
    made: list[Case] = []
    peaks: dict[str, dict[int, int]] = {recipe: {} for recipe in recipes}
    for count in sorted(blocks):
        with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
            model, parameters = predict.generated(Path(folder), {**SHAPE, "num_hidden_layers": count})
            for recipe in recipes:
                found = predict.compared(model, predict.Asked(recipe, LIMIT, TOKENS, BATCH, LOOK))
                peaks[recipe][count] = found["measured"]["peak_over_imports"]
                made += cases_of(recipe, count, parameters, found)
                grown = [case for name, of_recipe in peaks.items() for case in growth(name, of_recipe)]
                settings = {"windows": list(TOKENS), "batch": BATCH, "limit": LIMIT, "ratio": predict.RATIO, **SHAPE}
                common.write(report, common.result("large", [*made, *grown], settings))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Runs on large generated checkpoints.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    asked = parser.parse_args()
    measure(asked.report, asked.recipes, asked.blocks)


if __name__ == "__main__":
    main()
