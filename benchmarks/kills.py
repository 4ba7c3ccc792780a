"""Runs that survive being killed: SIGKILL at random moments, then the same command again, to the same bytes.

Every run is `spectrim compress reference …` in a process of its own, with a small calibration and a shortened training.
Of each recipe one run is left alone: its output is what the others are compared with (all files but `run.json`), and it
says how long a run takes and when it stores its first artifact. A run is killed after a time drawn uniformly, by a
seeded generator: seven times of eight between its own first artifact and the end that the undisturbed run says, for the
rest of it is imports mostly; one time of eight between its start and the first artifact. A run that has ended by then
is not counted: its times are those of the undisturbed run from then on, and another one is started. Whether an artifact
was there is looked up once the process is dead.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.common import Bound, Case

KILLS = 40
SAME = Bound("at least", 1.0)
LATE = 0.75  # the least share of kills after the first artifact
TRAINING = ("steps=120", "batch=1", "sequences=4", "length=32")  # the state is saved every 50 steps
RECIPES: dict[str, tuple[str, ...]] = {
    "whitened": (), "unirank": (), "duo-svd": ("groups.0.allocate.sequences=4",),
    "soco": tuple(f"groups.0.allocate.{setting}" for setting in TRAINING),
}  # fmt: skip
SIZES = ("--ratio", "0.2", "--sequences", "16", "--length", "64")
LOOK = 0.005  # seconds between two looks at the work directory
TRIES = 20  # runs started for one kill

Command = Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing killed: its seconds, those until its first artifact, its output."""

    seconds: float
    first: float
    output: Mapping[str, str]


@dataclass(frozen=True)
class Kill:
    """A run that was killed: seconds after its start, artifacts stored by then, whether the same bytes came of it."""

    seconds: float
    artifacts: int
    same: bool


def command(recipe: str) -> Command:
    """The command of a recipe that writes to a directory."""
    settings = [part for setting in RECIPES[recipe] for part in ("--set", setting)]
    fixed = [sys.executable, "-m", "spectrim", "compress", "reference", "--recipe", recipe, *SIZES, *settings, "--json"]
    return lambda out: [*fixed, "--out", str(out)]


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file by its name, but of `run.json`, which holds times."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def artifacts(out: Path) -> int:
    """How many artifacts the work directory of an output holds."""
    return len(list(Path(f"{out}.work").glob("*/[!.]*")))


@contextmanager
def started(of: Command, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run on one thread, ended at the end at the latest; what it says goes to a file beside its output."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1"}
    with open(f"{out}.log", "ab") as log:
        process = subprocess.Popen(
            of(out), cwd=common.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run and all that it started, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], out: Path) -> dict[str, str]:
    """Wait for a run's end, and hash its output. Raises RuntimeError with what it said if it failed."""
    if process.wait() != 0:
        said = Path(f"{out}.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run of {out} ended with {process.returncode}:\n{said[-2000:]}")
    return tree(out)


def undisturbed(of: Command, out: Path) -> Undisturbed:
    """Let a run work to its end. Raises RuntimeError if it failed or stored nothing."""
    begin = time.perf_counter()
    first = None
    with started(of, out) as process:
        while process.poll() is None:
            if first is None and artifacts(out):
                first = time.perf_counter() - begin
            time.sleep(LOOK)
        seconds, output = time.perf_counter() - begin, finish(process, out)
    if first is None:
        raise RuntimeError(f"no artifact was seen in {out}.work")
    return Undisturbed(seconds, first, output)


def kill(of: Command, out: Path, alone: Undisturbed, early: bool, draw: random.Random) -> Kill | Undisturbed:
    """Start a run, kill it at a random moment, and let the same command go on; if it ended before, what it says."""
    begin, first = time.perf_counter(), alone.first
    with started(of, out) as process:
        if not early:
            while process.poll() is None and not artifacts(out):
                time.sleep(LOOK)
            first = time.perf_counter() - begin
        until = time.perf_counter() + draw.uniform(0, alone.first if early else alone.seconds - alone.first)
        while process.poll() is None and time.perf_counter() < until:
            time.sleep(LOOK)
        end(process)
    seconds = time.perf_counter() - begin
    if process.returncode != -signal.SIGKILL:
        return Undisturbed(seconds, min(first, seconds), finish(process, out))
    if out.exists():  # its output was whole
        return Undisturbed(seconds, min(first, seconds), tree(out))
    stored = artifacts(out)
    with started(of, out) as again:
        return Kill(seconds, stored, finish(again, out) == alone.output)


def kills(commands: Mapping[str, Command], count: int, seed: int, folder: Path) -> dict[str, list[Kill]]:
    """`count` kills, the recipes in turns. Raises RuntimeError when a run fails or is over too soon every time."""
    draw = random.Random(seed)
    alone = {name: undisturbed(of, folder / name) for name, of in commands.items()}
    found: dict[str, list[Kill]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(count):
        name, turn = names[number % len(names)], number // len(names) + number % len(names)
        for attempt in range(TRIES):
            made = kill(commands[name], folder / f"{name}-{number}-{attempt}", alone[name], turn % 8 == 7, draw)
            if isinstance(made, Kill):
                found[name].append(made)
                break
            if made.output != alone[name].output:
                raise RuntimeError(f"{name}: two runs that nothing killed give different bytes")
            alone[name] = made  # the machine has become faster
        else:
            raise RuntimeError(f"{name}: {TRIES} runs were over before they could be killed")
    return found


def cases(found: Mapping[str, Sequence[Kill]]) -> list[Case]:
    """The share of each recipe's kills that end in the same bytes, and how many came after the first artifact."""
    made = [
        Case(
            name, (sum(each.same for each in of) / len(of),), 1, "share with the same bytes", SAME,
            {"after_first_artifact": sum(each.artifacts > 0 for each in of), "kills": [asdict(each) for each in of]},
            len(of),
        )
        for name, of in found.items() if of
    ]  # fmt: skip
    every = [each for of in found.values() for each in of]
    late = sum(each.artifacts > 0 for each in every)
    bound = Bound("at least", LATE * len(every))
    return [*made, Case("kills after the first artifact", (float(late),), 1, "kills", bound, {"kills": len(every)})]


def table(found: Mapping[str, Sequence[Kill]]) -> str:
    """A line a recipe."""
    lines = ["| recipe | kills | after the first artifact | same bytes |", "| --- | --- | --- | --- |"]
    every = [each for of in found.values() for each in of]
    for name, of in {**found, "all": every}.items():
        late, same = sum(each.artifacts > 0 for each in of), sum(each.same for each in of)
        lines.append(f"| {name} | {len(of)} | {late} | {same} |")
    return "\n".join(lines)


def main() -> None:
    """Kill, print the table, write the result."""
    parser = argparse.ArgumentParser(description="Runs that are killed and go on.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        commands = {name: command(name) for name in asked.recipes}
        found = kills(commands, asked.kills, asked.seed, Path(folder))
    print(table(found))
    settings = {"kills": asked.kills, "seed": asked.seed, "sizes": list(SIZES), "recipes": RECIPES}
    common.write(asked.report, common.result("kills", cases(found), settings))


if __name__ == "__main__":
    main()
