"""Run benchmarks, each in a process of its own, keep their results, and write the tables made of them.

python -m benchmarks.run [NAME ...] [--results DIR] [--tables-only]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

# each with the most processor threads that it uses
NAMES = {
    "decompose": 2, "whole_run": 1, "inference": 1, "memory": 2, "allocate": 1, "deviation": 1, "sparse": 1, "rpca": 1,
    "training": 2, "finetune": 2, "kills": 1, "predict": 1, "processes": 2, "own_recipe": 1, "large": 1,
}  # fmt: skip
HOURS = ("large",)  # what takes hours is run where it is named
RESULTS = common.ROOT / "benchmarks" / "results"
PAGES = (common.ROOT / "benchmarks" / "README.md", common.ROOT / "docs" / "benchmarks.md")
START, END = "<!-- results: written by benchmarks.run -->", "<!-- end of results -->"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The figures of all results, and under them where and with what they were taken."""
    lines = [
        "| benchmark | case | figure | min to max | bound | holds | threads | repeats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines += [_row(result["benchmark"], case) for case in result["cases"]]
    return "\n".join([*lines, "", *(_place(result) for result in results)])


def _row(benchmark: str, case: Mapping[str, Any]) -> str:
    bound, holds = case["bound"], {None: "", True: "yes", False: "**no**"}[case["holds"]]
    limit = "" if bound is None else f"{bound['side']} {bound['limit']:g}"
    figures = f"{case['value']:.3f} | {case['min']:.3f} to {case['max']:.3f}"
    return f"| {benchmark} | {case['name']} | {figures} | {limit} | {holds} | {case['threads']} | {case['repeats']} |"


def _place(result: Mapping[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    commit = (result["commit"] or "no commit yet")[:12] + (", with changes" if result["dirty"] else "")
    return (
        f"- {result['benchmark']}: {hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gb']:g} GB, load "
        f"{hardware['load']:g} at the end; torch {versions['torch']}, transformers {versions['transformers']}; {commit}"
    )


def write_tables(results: Path, pages: Sequence[Path]) -> None:
    """Put the table of all result files of a folder between the two marks of each page.

    Raises ValueError for a page without the marks.
    """
    files = [results / f"{name}.json" for name in NAMES]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if START not in text or END not in text:
            raise ValueError(f"{page} lacks the lines {START!r} and {END!r}, between which the table belongs")
        before, after = text.split(START)[0], text.split(END)[1]
        page.write_text(f"{before}{START}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Run what was asked; 1 if a bound does not hold or a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmarks.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which (default all but {', '.join(HOURS)}): {', '.join(NAMES)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--tables-only", action="store_true", help="only write the tables again")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(NAMES)}")
    names = [] if asked.tables_only else asked.names or [name for name in NAMES if name not in HOURS]
    failed = [name for name in names if not _run(name, asked.results.resolve())]
    if asked.results.resolve() == RESULTS:
        write_tables(RESULTS, PAGES)
    return 1 if failed else 0


def _run(name: str, results: Path) -> bool:
    """Run one benchmark and print its cases; whether it ran and its bounds hold."""
    print(f"{name} …", flush=True)
    start = time.perf_counter()
    try:
        common.run_module(name, str(results / f"{name}.json"), threads=NAMES[name])
    except subprocess.CalledProcessError as error:
        print(f"  failed with exit code {error.returncode}", file=sys.stderr)
        return False
    cases = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        print(f"  {_row(name, case)}")
    print(f"  {time.perf_counter() - start:.0f} s")
    return all(case["holds"] is not False for case in cases)


if __name__ == "__main__":
    sys.exit(main())
