"""Searches for the ratio at which a model comes out as large as wanted, or loses as much as is allowed.

Every ratio that is tried is planned as it would be by itself, from one work directory: statistics and decompositions
on the dense model, and what allocators measured, serve all of them; what a second pass makes depends on the ratio.

- For bytes or parameters a first ratio follows from shapes (`sizes.Aim`). Where what comes out is too large, or further
  below the limit than its tolerance and than one unit of the largest matrix, others are tried, by secants.
- For a loss, whole hundredths are tried, first the recipe's own ratio, then between the largest one that is known to
  lose no more than allowed and the least one that loses more, by what the loss was there, until they are neighbours.
  The loss is taken to rise with the ratio, and a ratio that the method has no plan for to lose more than any.

The loss is the mean of −log p(next token) over that of the dense model, in nats a token, on the windows of
`calibrate.accept`, to which nothing is fitted. A second pass towards the dense model is checked on the same windows
against doing without it. It is measured block by block, with factors not yet rounded to the dtype they are stored in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from spectrim import sizes, towards
from spectrim.calibrate.paired import Lost
from spectrim.core import distributed
from spectrim.core.plan import Candidate, Plan
from spectrim.driving import Windows, text_hash
from spectrim.planning import planned
from spectrim.recipe import Calibrate, Recipe, RecipeError
from spectrim.run import Run
from spectrim.sizes import GRID, Aim, Size

logger = logging.getLogger(__name__)

STEPS = 100  # of the ratios that a loss is measured at
TRIES = 8  # for bytes or parameters
Started = tuple[Run, Sequence[Plan | None]]


@dataclass(frozen=True)
class Found:
    """What is to be written: the run at its ratio, the plan, its candidates; facts: what `run.json` says of the way."""

    run: Run
    plan: Plan
    candidates: dict[str, Candidate]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Search:
    """One search: the run at the first ratio, and how one at another is started (`again`)."""

    first: Started
    size: Size | None
    aim: Aim | None
    again: Callable[[Recipe], Started]
    measure: bool = False
    tries: list[dict[str, Any]] = field(default_factory=list)

    def go(self) -> Found:
        """The plan wanted; with `measure` also what it loses. Raises RecipeError where no ratio will do."""
        if self.size is None:
            run, early = self.first
            found = Found(run, *planned(run, early))
        elif self.aim is not None:
            found = _Fitting(self, self.aim).go()
        else:
            assert self.size.max_loss is not None
            found = _Bisection(self, self.size.max_loss).go()
        facts: dict[str, Any] = {"tries": self.tries} if self.tries else {}
        if self.measure or (self.size is not None and self.size.max_loss is not None):
            facts["loss"] = loss_of(found)
        return replace(found, facts=facts)

    def at(self, ratio: float) -> Started:
        """The run at a ratio."""
        own = self.first[0].asked
        asked = sizes.scaled(own if self.aim is None else self.aim.asked, ratio)
        return self.first if asked == own else self.again(asked)

    def note(self, ratio: float, **said: Any) -> None:
        """Log one try and keep it."""
        self.tries.append({"ratio": ratio, **said})
        logger.info("tried ratio %s: %s", ratio, ", ".join(f"{name} {value}" for name, value in said.items()))


def _noted(found: Found, note: str) -> Found:
    logger.info(note)
    return replace(found, plan=replace(found.plan, notes=(*found.plan.notes, note)))


# --- bytes and parameters ---


class _Fitting:
    """Ratios in millionths; over: the largest one known to come out too large; best: the least that did not."""

    def __init__(self, search: Search, aim: Aim):
        self.search, self.aim = search, aim
        self.over, self.best = 0, GRID
        self.found: tuple[Found, int] | None = None

    def go(self) -> Found:
        aim, size = self.aim, self.aim.size
        ratio = round(sizes.largest(self.search.first[0].asked) * GRID)
        for _ in range(TRIES):
            off = self._try(ratio)
            if 0 <= off <= max(size.tolerance, aim.unit):
                break
            ratio = self._next(ratio, off)
            if not self.over < ratio < self.best:
                break
        if self.found is None:
            tried = [each.get("failed", f"{each.get(size.of):,} {size.of}") for each in self.search.tries]
            raise RecipeError(
                f"{size.option} {size.limit:,}: no ratio came out at or below it (tried: {'; '.join(tried)}); give "
                "more, or another recipe"
            )
        found, came = self.found
        return _noted(
            found, f"{size.option} {size.limit:,}: {came:,} {size.of} at ratio {self.best / GRID} "
            f"({len(self.search.tries)} tried)",
        )  # fmt: skip

    def _try(self, ratio: int) -> float:
        """By how much the output at a ratio stays below the limit; infinite where it cannot be planned."""
        search, aim = self.search, self.aim
        try:
            run, early = search.at(ratio / GRID)
            found = Found(run, *planned(run, early))
        except RecipeError as error:
            if distributed.world() > 1:  # the others only know that the first one failed
                raise
            search.note(ratio / GRID, failed=str(error))
            self.best = min(self.best, ratio)
            return math.inf
        came = aim.measure(found.plan)
        search.note(ratio / GRID, **{aim.size.of: came})
        if came > aim.size.limit:
            self.over = max(self.over, ratio)
        elif self.found is None or ratio < self.best:
            self.best, self.found = ratio, (found, came)
        return float(aim.size.limit - came)

    def _next(self, ratio: int, off: float) -> int:
        """Where what is off would be made up for; in the middle where that was tried."""
        step = -math.inf if math.isinf(off) else off / self.aim.slope * GRID
        wanted = ratio - (math.floor(step) if step > 0 else math.floor(step) - 1) if math.isfinite(step) else -1
        return wanted if self.over < wanted < self.best else (self.over + self.best) // 2


# --- losses ---


def windows_of(run: Run) -> tuple[str, Windows] | None:
    """What a loss is measured on, and its name: what nothing is fitted to or chosen on, else what is chosen on."""
    for name, windows in (("accept", run.accept), ("select", run.select)):
        if windows is not None:
            return name, windows
    return None


def refuse_few(windows: Windows, calibrate: Calibrate) -> None:
    """Raise RecipeError where the windows of `accept` are too few tokens to tell two losses apart."""
    count, length = windows.shape
    if length < 2:
        raise RecipeError("--max-loss needs windows of 2 tokens or more: with fewer no token follows another")
    found = calibrate.shared_out(count)[2] * length
    if found >= towards.FEWEST:
        return
    enough = count
    while calibrate.shared_out(enough)[2] * length < towards.FEWEST:
        enough += 1
    raise RecipeError(
        f"--max-loss needs {towards.FEWEST} tokens of calibrate.accept ({calibrate.accept} of the windows) to measure "
        f"on, and has {found}: give {enough - count} more sequences of {length} tokens, {enough} in all "
        f"(--sequences {enough})"
    )


def loss_of(found: Found) -> dict[str, Any] | None:
    """What a plan loses, as JSON data, with the windows it was measured on; None without any."""
    on = windows_of(found.run)
    if on is None:
        return None
    return {**asdict(_lost(found.run, on, lambda: (found.plan, found.candidates))), "windows": on[0]}


def _lost(run: Run, on: tuple[str, Windows], made: Callable[[], tuple[Plan, Mapping[str, Candidate]]]) -> Lost:
    """Measured now, or kept from a run before; made: gives plan and candidates, if they are needed."""
    key = {
        "recipe": run.asked.model_dump(), "weights": run.fingerprint, "dtype": str(run.source.model.dtype),
        "stored": str(run.dtype), "device": run.device.type, "on": on[0],
        "text": [text_hash(each) for each in (run.windows, run.select, run.accept)],
    }  # fmt: skip
    if not distributed.agreed(lambda: run.store.has("lost", key, "json")):
        plan, candidates = made()
        with run.timings.stage("measure"):
            lost = towards.lost(run, plan, candidates, on[1])
        distributed.agreed(lambda: run.store.save_json("lost", key, asdict(lost)))
    return Lost(**distributed.agreed(lambda: run.store.load_json("lost", key)))


class _Bisection:
    """Ratios in hundredths; good, bad: the largest known to lose no more, the least known to lose more."""

    def __init__(self, search: Search, limit: int | float):
        self.search, self.limit = search, limit
        self.good, self.bad = 0, STEPS
        self.losses: dict[int, float] = {0: 0.0}
        self.widths: list[int] = []
        self.found: Found | None = None

    def go(self) -> Found:
        run, _ = self.search.first
        most = sizes.most_possible(run.asked, run.structure, STEPS, STEPS)
        self.bad = most + 1
        ratio = min(max(1, round(sizes.largest(run.asked) * STEPS)), most)
        while self.bad - self.good > 1:
            self._try(ratio)
            ratio = self._next()
        if self.good == 0:
            raise RecipeError(f"--max-loss {self.limit}: {self._least()}. Nothing was written; allow more")
        if self.found is None or sizes.largest(self.found.run.asked) != self.good / STEPS:
            run, early = self.search.at(self.good / STEPS)  # its loss was known from a run before
            self.found = Found(run, *planned(run, early))
        said = ", ".join(f"{ratio / STEPS}: {loss:.4g}" for ratio, loss in sorted(self.losses.items()) if ratio)
        return _noted(
            self.found, f"--max-loss {self.limit}: ratio {self.good / STEPS}, of the excess loss on the windows of "
            f"accept ({said})",
        )  # fmt: skip

    def _least(self) -> str:
        """What the smallest ratio tried came to."""
        tried = min(self.search.tries, key=lambda each: each["ratio"], default=None)
        if tried is None:
            return f"this recipe has no plan even at a ratio of {1 / STEPS}"
        if "failed" in tried:
            return f"the smallest ratio tried, {tried['ratio']}, has no plan: {tried['failed']}"
        return f"the best found is a ratio of {tried['ratio']}, which loses {tried['excess']:.4g}"

    def _try(self, ratio: int) -> None:
        """Measure at a ratio, and move the bound that it decides."""
        search, (run, early) = self.search, self.search.at(ratio / STEPS)
        assert run.accept is not None
        made: list[Found] = []

        def planned_now() -> tuple[Plan, Mapping[str, Candidate]]:
            made.append(Found(run, *planned(run, early)))
            return made[0].plan, made[0].candidates

        try:
            lost = _lost(run, ("accept", run.accept), planned_now)
        except RecipeError as error:
            if distributed.world() > 1:  # the others only know that the first one failed
                raise
            search.note(ratio / STEPS, failed=str(error))
            self.bad, self.losses[ratio] = ratio, math.inf
            return
        search.note(ratio / STEPS, excess=lost.excess, kl=lost.kl)
        self.losses[ratio] = lost.excess
        if lost.excess <= self.limit:  # not where it is no number
            self.good, self.found = ratio, made[0] if made else None
        else:
            self.bad = ratio

    def _next(self) -> int:
        """Where the loss should meet the limit, by the two nearest; in the middle where that goes too slowly."""
        good, bad = self.good, self.bad
        self.widths.append(bad - good)
        slow = len(self.widths) > 2 and 2 * self.widths[-1] > self.widths[-3]
        if bad not in self.losses:  # nothing known above
            wanted = 2 * good
        elif slow or not math.isfinite(self.losses[bad]):
            wanted = (good + bad) // 2
        elif self.losses[good] > 0 and self.limit > 0:  # a power of the ratio, as losses about are
            power = math.log(self.losses[bad] / self.losses[good]) / math.log(bad / good)
            wanted = math.floor(good * (self.limit / self.losses[good]) ** (1 / max(power, 1e-3)))
        else:
            wanted = math.floor(bad * (max(self.limit, 0.0) / self.losses[bad]) ** 0.5)
        return min(max(wanted, good + 1), bad - 1)
