"""How the runs of one command start: what each recipe comes to on the model, and where what it makes is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim import lean, needs, owntext
from spectrim.core import distributed
from spectrim.core.plan import Plan
from spectrim.data import text as texts
from spectrim.jobs import Job, allocate_early, plan_jobs
from spectrim.measure.evaluate import max_positions
from spectrim.model import targets
from spectrim.model.checkpoint import Checkpoint, Weights
from spectrim.recipe import Recipe
from spectrim.run import Run
from spectrim.searching import Started
from spectrim.settling import settled
from spectrim.strength import TRIALS

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Begun:
    """What a recipe comes to before anything heavy: jobs, plans made of shapes alone, and what the run has to hold."""

    jobs: Sequence[Job]
    early: Sequence[Plan | None]
    setting: needs.Setting
    room: int | None


@dataclass(frozen=True)
class Start:
    """What runs of one command share that differ in their ratios."""

    source: Weights
    structure: targets.Structure
    text: Any
    limit: int | None
    out: str | Path | None
    available: int  # bytes of memory that the process may take where there is no limit

    def begun(self, asked: Recipe) -> Begun:
        """Raises RecipeError for a recipe that does not fit the model, or this limit."""
        open_still = _setting(self.source, self.structure, asked, plan_jobs(asked, self.structure), self.text)
        setting = settled(open_still, self.limit or self.available)
        early = [allocate_early(job, asked) for job in setting.jobs]
        return Begun(setting.jobs, early, setting, None if self.limit is None else needs.room(setting, self.limit))

    def ready(self, run: Run, begun: Begun) -> Started:
        """A run that knows where its hidden states and factors lie."""
        run.room = begun.room
        run.lean = distributed.agreed(lambda: _lean(run, begun.setting, begun.early, self.out))
        return run, begun.early

    def again(self, run: Run, asked: Recipe) -> Started:
        """The same run of a recipe with other ratios."""
        begun = self.begun(asked)
        return self.ready(run.at(asked, begun.jobs), begun)


def _setting(
    source: Weights, structure: targets.Structure, asked: Recipe, jobs: Sequence[Job], text: Any
) -> needs.Setting:
    """What decides how much the run holds."""
    longest = max_positions(source.model)
    length = asked.calibrate.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    sequences = asked.calibrate.sequences
    if isinstance(text, Tensor) and text.ndim == 2:
        sequences, length = text.shape
    stored = source.stored_dtype if isinstance(source, Checkpoint) else source.model.dtype
    own = texts.SELF in owntext.sources(text)
    return needs.Setting(source.model, structure, asked, jobs, sequences, length, stored.itemsize, own)


def _lean(run: Run, setting: needs.Setting, early: Sequence[Plan | None], out: str | Path | None) -> frozenset[str]:
    """Targets whose factors are not stored. Raises StoreError where even then the disk is too full."""
    sequential, directory = run.asked.calibrate.sequential, run.store.directory
    only_second = sequential and all(plan is not None for plan in early)
    # what a second pass has made already is known by the keys of the blocks before it, once it runs
    pending = [] if only_second and (directory / "candidate").exists() else run.pending()
    passes = (2 if sequential and not only_second else 1) + (TRIALS if run.asked.calibrate.shrink == "auto" else 0)
    return lean.chosen(run.jobs, pending, _beside(run, setting, out), directory, passes)


def _beside(run: Run, setting: needs.Setting, out: str | Path | None) -> int:
    """Bytes that the disk of the work directory has to take beside first candidates."""
    found = 0
    if run.room is not None:
        streams = [trial.states - run.room for trial in needs.trials(setting)]
        found += max(0, 2 * setting.hidden_states if setting.measured and not setting.resident else 0, *streams)
    if out is not None and lean.same_disk(Path(out), run.store.directory):
        dense = sum(target.parameters for target in run.targets)
        total = sum(p.numel() for p in setting.model.parameters())
        found += setting.stored * (total - dense + sum(job.budget for job in run.jobs))
    return found
