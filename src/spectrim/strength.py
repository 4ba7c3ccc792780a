"""How far Grams are shrunk (`calibrate.shrink: auto`): as far as it costs nothing on text that was not fitted to.

A Gram knows what one text needs, and low rank in its metric takes from everything else. Shrunk towards the mean of its
diagonal it gives that back, and up to some strength the text itself loses nothing. How much other texts gain cannot be
measured on it, but they gain with every step. So of the strengths tried the largest is taken at which the KL to the
dense model, on windows of `select`, is at most `TOLERATED` above the least.

Each is tried with what it is for, ranks at the ratio of their group, the same share everywhere: what an allocator
would make of them does not matter here, and takes long with those that run the model. A try is a whole calibration and
decomposition, streamed as ever; one that was made stays in the work directory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from spectrim.core import budget
from spectrim.core import plan as plans
from spectrim.core.plan import Candidate, Plan, Target
from spectrim.jobs import Job
from spectrim.recipe import RecipeError
from spectrim.run import Run
from spectrim.towards import FEWEST, divergence

logger = logging.getLogger(__name__)

# Where to begin, and what is taken where there is not enough text to choose on.
START = 0.1
LEAST, MOST = 0.025, 0.8
TOLERATED = 0.01
TRIALS = 3  # decompositions beside the one that is used, mostly


def settle(run: Run) -> tuple[str, ...]:
    """Choose the strength, where that is asked for; what is to be said of it. Raises RecipeError as `_even`."""
    asked = run.asked.calibrate.shrink
    if asked == 0:
        return ()
    if not any(_shrinks(run, target) for target in run.targets):
        note = f"calibrate.shrink: {asked} changes nothing here: no method of this recipe reads a Gram"
    elif asked != "auto":
        return ()
    elif run.select is None or run.select.numel() < FEWEST:
        found = 0 if run.select is None else run.select.numel()
        run.shrinking = replace(run.shrinking, share=START)
        note = (
            f"calibrate.shrink: auto has {found} tokens of calibrate.select to choose on, not {FEWEST}: it is {START}"
        )
    else:
        tried = _tried(run)
        run.shrinking = replace(run.shrinking, share=_largest(tried))
        said = ", ".join(f"{share:g}: {lost:.4g}" for share, lost in sorted(tried.items()))
        note = f"calibrate.shrink: {run.shrinking.share:g}, of the KL at even ranks on the windows of select ({said})"
        logger.info(note)
        return (note,)
    logger.warning(note)
    return (note,)


def _shrinks(run: Run, target: Target) -> bool:
    return any(s.shrinks for s in run.decomposers[target.name].needs)


def _tried(run: Run) -> dict[float, float]:
    """KL by strength: none, the first one, then twice that and on while it costs nothing, or half of it and on."""
    lost = {share: _lost(run, share) for share in (0.0, START)}
    up = _largest(lost) == START
    share = START * 2 if up else START / 2
    while LEAST <= share <= MOST:
        lost[share] = _lost(run, share)
        if (_largest(lost) == share) != up:
            break
        share = share * 2 if up else share / 2
    return lost


def _largest(lost: Mapping[float, float]) -> float:
    """The largest strength that costs nothing."""
    least = min(lost.values())
    return max(share for share, each in lost.items() if each <= (1 + TOLERATED) * least) if least < math.inf else 0.0


def _lost(run: Run, share: float) -> float:
    """KL on the windows of `select` at even ranks, nats a token; what is not finite counts as infinite."""
    assert run.select is not None
    run.shrinking = replace(run.shrinking, share=share)
    found = divergence(run, *_even(run, run.candidates()), run.select)
    return found if math.isfinite(found) else math.inf


def _even(run: Run, candidates: Mapping[str, Candidate]) -> tuple[Plan, Mapping[str, Candidate]]:
    """The same share for all that is decomposed with a Gram, the rest dense. Raises RecipeError naming the group."""
    made = []
    for job in run.jobs:
        targets = [target for target in job.targets if _shrinks(run, target)]
        if targets:
            made.append(_ranks(job, targets))
    return plans.merge(made), candidates


def _ranks(job: Job, targets: list[Target]) -> Plan:
    allowed = budget.allowed(targets, job.group.ratio)
    fixed = {target.name: job.fixed[target.name] for target in targets if target.name in job.fixed}
    try:
        ranks = budget.even_ranks(targets, allowed, job.format, fixed=fixed)
    except ValueError as error:
        raise RecipeError(
            f"group {job.group.match!r}: calibrate.shrink: auto tries the same share everywhere: {error}; give a number"
        ) from error
    return budget.rank_plan(targets, ranks, job.format, allowed, fixed)
