"""What all benchmarks share: times taken in turns, cases with their bounds, and the record of where they were taken."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Bound:
    """What a figure has to keep to."""

    side: Literal["at most", "at least"]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether `value` keeps to it."""
        return value <= self.limit if self.side == "at most" else value >= self.limit


@dataclass(frozen=True)
class Case:
    """One figure: its values (their median counts), its unit, its bound, and what it is made of.

    `each` is the number of repeats of which every value is the median already.
    """

    name: str
    values: tuple[float, ...]
    threads: int
    unit: str = "ratio"
    bound: Bound | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    each: int = 1

    @property
    def value(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        """The case as JSON data."""
        return {
            "name": self.name,
            "value": self.value,
            "min": min(self.values),
            "max": max(self.values),
            "repeats": len(self.values) * self.each,
            "threads": self.threads,
            "unit": self.unit,
            "bound": None if self.bound is None else asdict(self.bound),
            "holds": None if self.bound is None else self.bound.holds(self.value),
            "details": dict(self.details),
        }


Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Turns:
    """Seconds of several runs, turn by turn: by the clock on the wall, and the processor's on this process alone.

    The processor's seconds are those to compare on one thread: other programs do not lengthen them, but waiting for
    the disk is not in them either.
    """

    wall: Seconds
    processor: Seconds


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> Turns:
    """Time each run `repeats` times in turns, so that what else the machine does falls on all of them alike.

    Raises ValueError for no repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: at least 1 is needed")
    turns = Turns({name: [] for name in runs}, {name: [] for name in runs})
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            run()
            turns.wall[name].append(time.perf_counter() - wall)
            turns.processor[name].append(time.process_time() - processor)
    return turns


def ratios(seconds: Seconds, over: str, under: Sequence[str]) -> tuple[float, ...]:
    """Of each turn, the seconds of `over` divided by those of all `under` together."""
    below = [sum(turn) for turn in zip(*(seconds[name] for name in under), strict=True)]
    return tuple(above / part for above, part in zip(seconds[over], below, strict=True))


def medians(seconds: Seconds) -> dict[str, float]:
    """The median seconds of each run, rounded to 0.1 ms."""
    return {name: round(statistics.median(times), 4) for name, times in seconds.items()}


def result(benchmark: str, cases: Sequence[Case], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a result file: the cases, what they were run with, and where."""
    return {
        "benchmark": benchmark,
        **commit(),
        "versions": {"spectrim": version("spectrim"), "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "hardware": hardware(),
        "settings": dict(settings),
        "cases": [case.to_json() for case in cases],
    }


def commit() -> dict[str, Any]:
    """The commit of this checkout (None before the first one), and whether files differ from it."""
    head = _git("rev-parse", "--verify", "HEAD")
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/README.md", ":!docs")
    return {"commit": head or None, "dirty": bool(status)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores that may be used, memory, and the load from others when asked."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _field(path: Path, name: str) -> str:
    """The value of the first line `name: value` of a file under /proc; empty where there is none."""
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def peak_bytes() -> int:
    """The most memory this process has held at once.

    VmHWM rather than ru_maxrss: the latter also counts what the parent held before this program began.
    """
    return int(_field(Path("/proc/self/status"), "VmHWM").removesuffix("kB")) * 1024


def program_bytes() -> int:
    """Pages of programs and libraries that lie in memory: more with every part that runs for the first time.

    They lie in files, are shared by all processes and can be dropped at any moment.
    """
    found, program = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):  # a mapping: addresses, permissions, offset, device, inode, and what is mapped
            program = len(fields) > 5 and (
                ".so" in Path(fields[5]).name or fields[5] == os.path.realpath(sys.executable)
            )
        elif program and fields[0] in ("Rss:", "Anonymous:"):
            found += int(fields[1]) * (1 if fields[0] == "Rss:" else -1)
    return found * 1024


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run_module(module: str, *arguments: str, threads: int = 1) -> None:
    """Run a module of this package in a process of its own. Raises CalledProcessError when it fails."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **limits}, check=True)
