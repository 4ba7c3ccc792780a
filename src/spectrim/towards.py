"""The second pass towards the dense model: what a block is made of depends on what the blocks before it have lost.

For each matrix, x′ being its inputs in the compressed model so far and y what the dense model has at its output,

    W* = argmin Σ‖share · y + (1 − share) · W x′ − W* x′‖² + a ridge that pulls to W      (`linalg.pulled`)

is decomposed in its place, in the metric of x′. That is the best of a given rank for these outputs too: the error
splits into what no matrix can reach and what is cut off W*. With `residual_aware` y of `o` and `down` is what gives the
dense residual stream, so what was lost before them counts too. Any decomposer works so, and keeps its planned size.

Sources: outputs of the dense model on compressed inputs are AA-SVD's (arXiv 2604.02119), the mix PIFA's (arXiv
2501.19090). Our own: both in one closed form for every decomposer, and the residual stream as what is aimed at.
Costs: two streams, run as far as each step of a block (q, k, v; o; gate, up; down), the compressed one once more whole;
out × in float64 of each matrix of a step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from spectrim import driving
from spectrim.calibrate.collect import BlockStatistics
from spectrim.calibrate.paired import Lost, Measured, Step, steps_of
from spectrim.calibrate.states import InMemory
from spectrim.calibrate.statistics import Gram, Statistic
from spectrim.core import distributed
from spectrim.core.linalg import pulled
from spectrim.core.plan import Candidate, Choice, Plan, Target
from spectrim.core.store import hash_of
from spectrim.model.live import Installed
from spectrim.run import Run

logger = logging.getLogger(__name__)


Made = tuple[Plan, dict[str, Candidate]]

# Where the share is not chosen on text, and how far apart those are that it is chosen of.
SHARE = 0.5
STEP = 0.25
TRIED = 3  # shares that a choice comes to at least
# Fewer tokens than these tell no share from another.
FEWEST = 1024


def pass_towards_dense(run: Run, plan: Plan, first: Mapping[str, Candidate] | None) -> Made:
    """Each matrix of the plan decomposed again at its planned size, from and towards what the file's docstring says.

    first: the candidates of the first pass, where there was one: with `calibrate.accept` the better of both stays.
    """
    asked, notes = run.asked.calibrate, list[str]()
    if asked.target == "mix" and asked.mix == "auto":
        share, made, said = _chosen(run, plan)
        notes.append(said)
    else:
        share = 1.0 if asked.target == "dense" or asked.mix == "auto" else asked.mix
        made = _Pass(run, plan, share).go()
    if run.accept is not None and first is not None:
        dense = InMemory()
        before, after = (divergence(run, *each, run.accept, dense) for each in ((plan, dict(first)), made))
        verdict = f"KL on the windows of accept: {after:.4g} after the second pass, {before:.4g} before it"
        if not after <= before:
            made, verdict = (plan, dict(first)), f"{verdict}; the first one stays"
        notes.append(verdict)
    for note in notes:
        logger.info(note)
    return replace(made[0], notes=(*made[0].notes, *notes)), made[1]


def _chosen(run: Run, plan: Plan) -> tuple[float, Made, str]:
    """The share of least KL on the windows of `select`, stepping from the middle while it falls; what it made."""
    if run.select is None or run.select.numel() < FEWEST:
        found = 0 if run.select is None else run.select.numel()
        note = f"calibrate.mix: auto has {found} tokens of calibrate.select to choose on, not {FEWEST}: it is {SHARE}"
        logger.warning(note)
        return SHARE, _Pass(run, plan, SHARE).go(), note
    windows, made, lost = run.select, dict[float, Made](), dict[float, float]()

    def measured(share: float) -> float:
        if share not in lost:
            made[share] = _Pass(run, plan, share).go()
            lost[share] = divergence(run, *made[share], windows)
        return lost[share]

    best = SHARE
    for step in (STEP, -STEP):
        while 0 <= best + step <= 1 and measured(best + step) < measured(best):
            best += step
        if best > SHARE:
            break
    tried = ", ".join(f"{share}: {lost[share]:.4g}" for share in sorted(lost))
    return best, made[best], f"calibrate.mix: {best}, of the KL on the windows of select ({tried})"


def divergence(
    run: Run,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    windows: driving.Windows,
    dense: InMemory | None = None,
) -> float:
    """KL(dense ‖ compressed) of a plan, nats a token, block by block; the blocks are not all in memory at once.

    dense: as in `lost`.
    """
    return lost(run, plan, candidates, windows, dense).kl


def lost(
    run: Run,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    windows: driving.Windows,
    dense: InMemory | None = None,
) -> Lost:
    """KL and excess loss of a plan on windows, block by block as `divergence`.

    The factors are those that would be stored, in the dtype that is computed in. dense: states of the dense model,
    empty the first time; given again for the same windows, that model is not run again.
    """
    installed: dict[str, nn.Module] = {}
    live = Installed(run.source.model, run.structure, candidates, windows, 1)
    inside = [
        [t for t in run.targets if t.blocks[-1] == i and t.name in plan.choices] for i in range(run.structure.count)
    ]
    pair = driving.paired(run, installed, windows=windows)
    pair.residual = False
    if dense is not None:
        pair.dense, pair.ended = dense, bool(dense.held)
    for step in pair.steps(inside, through=True):
        for target, owner in zip(step.targets, run.dealt(step.targets), strict=True):
            installed |= live.built(target.name, plan.choices[target.name], owner)
    return pair.lost()


class _Pass:
    """The pass so far; entering: for every block come to, a hash of all that was made before it."""

    def __init__(self, run: Run, plan: Plan, share: float):
        self.run, self.plan, self.share = run, plan, share
        asked = run.asked.calibrate
        aim = {"share": share, "residual": asked.residual_aware, "ridge": asked.ridge}
        self.upstream = hash_of({"towards": aim})
        self.entering = [self.upstream]
        self.candidates: dict[str, Candidate] = {}
        self.choices: dict[str, Choice] = {}
        self.installed: dict[str, nn.Module] = {}

    def go(self) -> Made:
        """The plan with what each choice became, and the candidates to cut to it."""
        run = self.run
        inside = run.inside(self.plan)
        with run.timings.stage("calibrate"):
            if not all(self._from_store(targets) for targets in inside):
                self._through(inside)
        run.count_once()
        driving.forget_states(run)
        driving.forget_states(run, self._entered)
        return run.recounted(self.plan, self.choices), self.candidates

    def _entered(self, block: int) -> str | None:
        return self.entering[block] if block < len(self.entering) else None

    def _from_store(self, targets: Sequence[Target]) -> bool:
        """Take what the store has of a block; whether that is all of it."""
        for step in steps_of(targets):
            if self._missing(step):
                return False
            self._take(step)
        self.entering.append(self.upstream)
        return True

    def _through(self, inside: Sequence[Sequence[Target]]) -> None:
        """Both streams through all blocks up to the last one that has targets."""
        pair = driving.paired(self.run, self.installed, self._entered)
        for step in pair.steps(inside):
            if not all(target.name in self.choices for target in step.targets):
                self._decompose(step)
                self._take(step.targets)
            self._install(step.targets)
            if step.last and len(self.entering) == step.block + 1:
                self.entering.append(self.upstream)

    def _missing(self, targets: Sequence[Target]) -> list[Target]:
        """Those of a step that the store does not have."""
        return distributed.agreed(lambda: [target for target in targets if not self.run.has(target, self.upstream)])

    def _decompose(self, step: Step) -> None:
        run, missing = self.run, self._missing(step.targets)
        if not missing:
            return
        needs = {t: tuple(s for s in run.decomposers[t.name].needs if s.where != "gradient") for t in step.targets}
        measured = step.measure({t: tuple(dict.fromkeys([*found, Gram()])) for t, found in needs.items()})
        statistics = self._with_gradients(missing, measured.statistics)
        for _ in run.decompose_all(missing, statistics, self.upstream, lambda target: self._instead(target, measured)):
            pass
        distributed.barrier()  # what others have made is read from here on

    def _instead(self, target: Target, measured: Measured) -> dict[str, Tensor]:
        """W* of each part, in the type that is computed in."""
        asked = self.run.asked.calibrate
        found = {}
        for part in target.parts:
            weight = self.run.weights(target)[part.module].to(self.run.device)
            gram = measured.statistics.inputs[part.input][Gram()]
            made = pulled(weight, gram, measured.of(part, weight), self.share, asked.ridge)
            found[part.module] = made.to(torch.promote_types(weight.dtype, torch.float32))
        return found

    def _with_gradients(self, targets: Sequence[Target], measured: BlockStatistics) -> BlockStatistics:
        """The statistics with those of gradients, which the first pass kept."""
        gradients: dict[str, dict[Statistic, Tensor]] = {}
        for target in targets:
            chosen: list[Statistic] = [s for s in self.run.decomposers[target.name].needs if s.where == "gradient"]
            gradients |= {part.module: self.run.gradients(part, chosen) for part in target.parts}
        return BlockStatistics(measured.inputs, gradients, {})

    def _take(self, targets: Sequence[Target]) -> None:
        """Candidates and choices of one step, and what the keys of later ones say of them."""
        run = self.run
        candidates = {target.name: run.stored(target, self.upstream) for target in targets}
        self.candidates |= candidates
        self.choices |= run.settle_all(list(candidates.values()), self.plan.choices, self.upstream)
        made = {t.name: [run.key(t, self.upstream), asdict(self.choices[t.name])] for t in targets}
        self.upstream = hash_of({"before": self.upstream, "made": made})

    def _install(self, targets: Sequence[Target]) -> None:
        """Send the compressed stream through what was made of one step."""
        run = self.run
        assert run.windows is not None
        live = Installed(run.source.model, run.structure, self.candidates, run.windows, 1)
        for target, owner in zip(targets, run.dealt(targets), strict=True):
            self.installed |= live.built(target.name, self.choices[target.name], owner)
