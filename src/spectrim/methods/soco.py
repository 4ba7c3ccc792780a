"""SoCo: a learned diagonal on the spectrum, trained in three stages (arXiv 2502.15092; revised for ICLR 2026).

Published (abstracts, reviews): every direction of every matrix gets a score s that multiplies it,

    W′ = U diag(σ s) Vᵀ (+ an offset d, "deviation", after it),

trained with all weights frozen on KL(dense ‖ compressed) plus a differentiable compression ratio plus a sparsity term,
in three stages that go over at preset steps: coarse compression, refinement to and fro, fine sparsification. Directions
are pruned by s, not by σ; survivors may have s > 1. Mapping, losses, rates and stages in numbers were never published:

    s = s_max sigmoid(θ), s_max = 2, at most 1 until stage 3; θ = 0 at the start;  h = sigmoid((s − τ)/T)
    forward: s h(s)/h(1) in stage 1; in stage 2 s where s > τ, else 0, with the gradient of the former
    L = KL + λ C,  C = Σ_l price_l Σ_i h_li / Σ_l (mn)_l      price: m + n (pivot: m + n − Σ h); see `gates.prices`
    ρ̃ = Σ_l min(mn, cost(Σ_i h_i))_l / Σ_l (mn)_l             from stage 2 on with 1(s > τ) for h
    λ = max(0, Λ + 0.1 η (ρ̃ − ρ_t)),  Λ ← max(0, Λ + η/steps (ρ̃ − ρ_t)) each step

are ours. Stage 1: ρ_t falls linearly from ρ̃ to the target ρ. Stage 2: ρ_t = ρ + a sin(2π n u)(1 − u): pressure on and
off, so that directions wrongly switched off come back. Stage 3: what the exact plan of the scores would leave out,
chosen anew at each step, is multiplied by a factor that falls from 1 to 0 and is alone under λ C; in the middle of the
stage the set is fixed and what is kept is trained on KL alone. (Where directions may act in part through stage 2, KL is
low as long as many do, and the plan that is cut from them is bad: docs/methods/soco.md.) Then s is folded into
the factors; a matrix that ends dense keeps its learned values (its offset too if it has a bias). No score is learned
by the error at a layer's own output: there s = 1 is the optimum of every kept direction, whatever the inputs.

Needs the whole model in memory, factored (`learn.gates`); costs `steps` passes forwards and backwards over `batch`
windows, and one forward pass over the windows for the teacher. Ours too: every matrix keeps 2 % of its directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.core import distributed
from spectrim.core.plan import Plan, Target
from spectrim.core.registry import Allocator, Decomposer, Problem, Sees, Trainable, allocator
from spectrim.core.spend import least_steps, single
from spectrim.learn.gates import Gates, check_memory, unscalable
from spectrim.learn.harden import with_learned
from spectrim.learn.training import Batches, Teacher, Trainer, divergence, passed_back

logger = logging.getLogger(__name__)

STAGES = ("coarse", "refine", "sparsify")
DAMPING = 0.1  # of η: what the present error adds to λ; without it ρ̃ overshoots at large ratios
COLUMNS = ("kl", "soft_ratio", "hard_ratio", "target", "multiplier", "polarised")


@allocator("soco")
@dataclass(frozen=True)
class SoCo(Allocator):
    """Directions by learned score, kept ones scaled by it.

    steps, batch: of the training; sequences, length: of the calibration windows, those that are trained on; rate and
    offset_rate: AdamW's; deviation: whether an offset is learned (counted where the matrix has no bias); mapping: how θ
    becomes s; largest: s_max; threshold: τ; dual: η; swing, turns: a and n; temperatures: T before and at
    the end of stage 3; stages: their shares of the steps; least: share of the directions that every
    matrix keeps; recompute: activations are kept once a block, and made again on the way back.
    """

    steps: int = 400
    batch: int = 4
    sequences: int | None = None
    length: int | None = None
    rate: float = 0.05
    offset_rate: float = 0.002
    deviation: bool = True
    mapping: Literal["sigmoid", "relu", "clamp"] = "sigmoid"
    gated: bool = True
    largest: float = 2.0
    threshold: float = 0.5
    dual: float = 400.0
    swing: float = 0.02
    turns: int = 4
    temperatures: tuple[float, float] = (0.2, 0.05)
    stages: tuple[float, float, float] = (0.4, 0.3, 0.3)
    least: float = 0.02
    recompute: bool = False
    needs = ()
    sees: ClassVar[Sees] = "model"
    grain: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("rate", "dual", "largest"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name, number, lowest in (("sequences", self.sequences, 1), ("length", self.length, 2)):
            if number is not None and number < lowest:
                raise ValueError(f"{name} is {number}: give at least {lowest}, or null for all there is")
        if not 0 <= self.offset_rate < math.inf:
            raise ValueError(f"offset_rate is {self.offset_rate}: it must be 0 or more")
        if self.largest < 1 or (self.largest == 1 and self.mapping == "sigmoid"):
            raise ValueError(f"largest is {self.largest}: scores start at 1, so it must be above 1")
        if min(self.stages) < 0 or abs(sum(self.stages) - 1) > 1e-9:
            raise ValueError(f"stages are {self.stages}: shares of the steps that add up to 1")
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperatures are {self.temperatures}: both must be above 0")
        if not 0 < self.threshold < self.largest:
            raise ValueError(f"threshold is {self.threshold}: it must lie between 0 and largest, {self.largest}")
        if not 0 <= self.least < 1:
            raise ValueError(f"least is {self.least}: the share of directions that stays is in [0, 1)")

    @property
    def learns(self) -> bool:
        """Yes."""
        return True

    def refuses(self, decomposer: Decomposer) -> str:
        """What has other units than directions, or makes its choice anew."""
        return unscalable("soco", decomposer)

    def check(self, problem: Problem) -> None:
        """Raise ValueError when the least directions exceed the budget, or the factors the machine's memory."""
        fixed = self.offsets(problem.targets)
        least = {t.name: self.floor(min(single(t).out_features, single(t).in_features)) for t in problem.targets}
        least_steps(problem.targets, problem.format, problem.budget, least, {**problem.fixed, **fixed})
        check_memory(problem.targets)

    def offsets(self, targets: Sequence[Target]) -> dict[str, int]:
        """Parameters of the biases that offsets add."""
        if not self.deviation:
            return {}
        return {t.name: single(t).out_features for t in targets if not single(t).bias}

    def allocate(self, problem: Problem) -> Plan:
        """Train, or take the training of the same budget that is remembered; then the exact plan of its scores."""
        assert problem.candidates is not None and isinstance(problem.live, Trainable)
        if problem.budget >= problem.dense:
            return Plan({}, problem.budget, problem.dense)
        made = problem.remember("soco", _fields(problem), lambda: _Training(self, problem).run())
        problem.slot("soco", _fields(problem)).clear()  # not before its result is remembered
        return _plan(self, problem, made)

    def stage(self, step: int) -> tuple[int, float]:
        """Which stage a step is in, and how far through it, in [0, 1)."""
        start = 0
        for index, share in enumerate(self.stages if step < self.steps else ()):
            length = round(share * self.steps) if index < 2 else self.steps - start
            if step < start + length:
                return index, (step - start) / length
            start += length
        return 2, 1.0

    def scores(self, raw: Float[Tensor, "all"]) -> Float[Tensor, "all"]:
        """s of θ; 1 at θ as it starts."""
        if self.mapping == "sigmoid":
            return self.largest * torch.sigmoid(raw - math.log(self.largest - 1))
        if self.mapping == "relu":  # a small slope below 0, backwards only: what was switched off can come back
            return raw.clamp_min(0) + 0.05 * (raw.clamp_max(0) - raw.clamp_max(0).detach())
        return raw.clamp(0, self.largest)

    def floor(self, directions: int) -> int:
        """How many of a matrix's directions stay in any case."""
        return max(1, math.ceil(self.least * directions))

    def begin(self) -> float:
        """θ at the start."""
        return 0.0 if self.mapping == "sigmoid" else 1.0


def _plan(soco: SoCo, problem: Problem, made: Mapping[str, Tensor]) -> Plan:
    """The exact plan of the scores at which the set was fixed, with the values learned since."""
    assert problem.candidates is not None and isinstance(problem.live, Trainable)
    gates = Gates(problem.live, problem.candidates, problem.format)
    fixed = soco.offsets(problem.targets)
    plan = gates.harden(made["fixing"], problem.budget, fixed, _least(soco, gates))
    values, offsets = gates.slices.split(made["scores"]), gates.outputs.split(made["offsets"])
    learned: dict[str, dict[str, Tensor]] = {}
    dense = [target for target in problem.targets if target.name not in plan.choices]
    for target in problem.targets:
        has_offset = soco.deviation and (target.name in plan.choices or single(target).bias)
        learned[target.name] = {"scale": values[target.name].clone()}
        if has_offset:
            learned[target.name]["offset"] = offsets[target.name].clone()
    curves = {f"soco {name}": made["history"][:, i].tolist() for i, name in enumerate(COLUMNS)}
    plan = with_learned(plan, learned, dense)
    return Plan(plan.choices, plan.budget, plan.spent, _notes(soco, problem, made), plan.learned, curves)


def _notes(soco: SoCo, problem: Problem, made: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What the training came to, where it fell short."""
    history, target = made["history"], problem.budget / problem.dense
    coarse, fixing = round(soco.stages[0] * soco.steps) - 1, int(made["fixed_at"]) - 1
    notes = []
    if coarse >= 0 and float(history[coarse, 1]) > target + 0.02:
        notes.append(
            f"soco: stage coarse ended at a soft ratio of {float(history[coarse, 1]):.3f}, target {target:.3f}; more "
            "steps or a larger rate would reach it"
        )
    soft, polarised = float(history[fixing, 1]), float(history[fixing, 5])
    if abs(soft - target) > 0.02 or polarised < 0.95:
        notes.append(
            f"soco: the set was fixed at a soft ratio of {soft:.3f}, target {target:.3f}, with {polarised:.1%} of the "
            "scores polarised: train longer before judging it"
        )
    for note in notes:
        logger.warning(note)
    return tuple(notes)


def _fields(problem: Problem) -> dict[str, int]:
    """What a training belongs to beside all that the problem comes from."""
    return {"budget": problem.budget, "seed": problem.generator.initial_seed()}


def _least(soco: SoCo, gates: Gates) -> dict[str, int]:
    """Directions that every matrix keeps."""
    return {name: soco.floor(place.stop - place.start) for name, place in gates.slices.of.items()}


class _Training:
    """One training for one budget."""

    def __init__(self, soco: SoCo, problem: Problem) -> None:
        assert problem.candidates is not None and isinstance(problem.live, Trainable)
        self.soco, self.problem, self.live = soco, problem, problem.live
        self.gates = Gates(problem.live, problem.candidates, problem.format)
        batches = problem.live.batches(soco.sequences, soco.length)
        self.windows, self.micro = torch.cat(list(batches)), len(batches[0])
        self.order = Batches(self.windows, soco.batch, problem.generator.initial_seed())
        self.fixed = soco.offsets(problem.targets)
        self.target = problem.budget / problem.dense
        total, outputs = self.gates.slices.total, self.gates.outputs.total
        self.raw = torch.full((total,), soco.begin(), requires_grad=True)
        self.offset = torch.zeros(outputs, requires_grad=True)
        self.state = {
            **{name: torch.zeros((), dtype=torch.float64) for name in ("multiplier", "integral", "initial")},
            "fixed_at": torch.zeros((), dtype=torch.int64),
            "fixing": torch.zeros(total),
            **{name: torch.ones(total) for name in ("keep", "chosen", "open")},
            "keep_offset": torch.ones(outputs) * soco.deviation,
        }

    def run(self) -> dict[str, Tensor]:
        """Train; the scores, the offsets, the scores that fixed the set, and what each step reported."""
        soco = self.soco
        slot = self.problem.slot("soco", _fields(self.problem))
        trainer = Trainer(
            {"raw": self.raw, "offset": self.offset}, {"raw": soco.rate, "offset": soco.offset_rate}, slot, COLUMNS,
            self.state, progress=self.problem.progress,
        )  # fmt: skip
        with self.gates:
            self.teacher = Teacher(self.live, self.gates, self.windows)
            history = trainer.run(soco.steps, self.update, self.after, self.rate, lambda s: STAGES[soco.stage(s)[0]])
            self.gates.set(None)
        with torch.no_grad():
            scores, offsets = self._values(soco.steps)
        return {
            "scores": scores.detach(), "offsets": offsets.detach(), "fixing": self.state["fixing"],
            "fixed_at": self.state["fixed_at"], "history": history,
        }  # fmt: skip

    def rate(self, step: int) -> float:
        """Cosine to a tenth in the last stage."""
        stage, through = self.soco.stage(step)
        return 1.0 if stage < 2 else 0.55 + 0.45 * math.cos(math.pi * through)

    def _values(self, step: int) -> tuple[Tensor, Tensor]:
        """What multiplies the directions, and the offsets."""
        soco, scores, temperature = self.soco, self.soco.scores(self.raw), self.temperature(step)
        if soco.gated and not self.state["fixed_at"]:
            at_one = torch.sigmoid(torch.tensor((1 - soco.threshold) / temperature))
            soft, stage = scores * self.soft(scores, temperature) / at_one, soco.stage(step)[0]
            acting = (scores > soco.threshold) | ((self.state["chosen"] > 0) & (stage == 2))
            scores = soft if stage == 0 else soft + (scores * acting - soft).detach()
        return scores * self.state["keep"], self.offset * self.state["keep_offset"]

    def temperature(self, step: int) -> float:
        """T: constant in stage 1, falling geometrically through stage 2."""
        stage, through = self.soco.stage(step)
        first, last = self.soco.temperatures
        return float(first * (last / first) ** (0.0 if stage == 0 else 1.0 if stage == 2 else through))

    def wanted(self, step: int) -> float:
        """ρ_t."""
        stage, through = self.soco.stage(step)
        if stage == 0:
            initial = float(self.state["initial"])
            return initial + (self.target - initial) * through
        swing = self.soco.swing * math.sin(2 * math.pi * self.soco.turns * through) * (1 - through)
        return self.target + (swing if stage == 1 else 0.0)

    def soft(self, scores: Tensor, temperature: float) -> Tensor:
        """h."""
        return torch.sigmoid((scores - self.soco.threshold) / temperature)

    def counted(self, step: int) -> Tensor:
        """What of each direction counts in ρ̃: h, from stage 2 on 0 or 1."""
        scores = self.soco.scores(self.raw.detach())
        if self.soco.gated and self.soco.stage(step)[0] > 0:
            return (scores > self.soco.threshold).to(scores)
        return self.soft(scores, self.temperature(step))

    @torch.no_grad()
    def ratio(self, kept: Tensor) -> float:
        """Share of the parameters at soft or hard gates; offsets are counted, and no matrix as more than dense."""
        total = 0.0
        for name, gates in self.gates.slices.split(kept.double()).items():
            total += min(self.gates.candidates[name].target.parameters, self._cost(name, float(gates.sum())))
        return total / self.gates.dense

    def _cost(self, name: str, rank: float) -> float:
        part = single(self.gates.candidates[name].target)
        size = part.out_features + part.in_features
        return self.fixed.get(name, 0) + rank * (size - rank if self.problem.format == "pivot" else size)

    def update(self, step: int) -> Mapping[str, float]:
        """Gradients of one step."""
        soco = self.soco
        self.fade(step)
        scores, offsets = self._values(step)
        ratio = self.ratio(self.counted(step) * self.state["keep"])
        if step == 0:
            self.state["initial"].fill_(ratio)
        # one graph from θ to s, many from s to the losses of the windows
        gate, shift = scores.detach().requires_grad_(), offsets.detach().requires_grad_()
        self.gates.set(gate, shift if soco.deviation else None)
        loss = passed_back(self.order.at(step), self.micro, self.loss)
        shift_grad = shift.grad if shift.grad is not None else torch.zeros_like(shift)
        torch.autograd.backward([scores, offsets], [gate.grad, shift_grad], retain_graph=True)
        if not self.state["fixed_at"]:
            (self.penalty(step) / distributed.world()).backward()
        low, high = 0.2 * soco.threshold, soco.threshold
        between = ((scores > low) & (scores < high)).double().mean()
        return {
            "kl": loss, "soft_ratio": ratio, "hard_ratio": self.ratio(scores.detach() > soco.threshold),
            "target": self.wanted(step), "multiplier": float(self.state["multiplier"]),
            "polarised": 1 - float(between),
        }  # fmt: skip

    def loss(self, chosen: Tensor) -> Tensor:
        """KL of some windows."""
        logits = self.live.answer(self.windows[chosen], self.soco.recompute)
        return divergence(self.teacher.log_probabilities(chosen), logits)

    def penalty(self, step: int) -> Tensor:
        """λ C; in stage 3 of the directions that are to go only."""
        soft = self.soft(self.soco.scores(self.raw), self.temperature(step))
        prices = self.gates.prices(soft) / self.gates.dense
        stage, _ = self.soco.stage(step)
        if stage == 1:  # matrices that are dense in the exact plan save nothing by less
            prices = prices * self.state["open"]
        elif stage == 2:
            prices = prices * (self.state["chosen"] == 0)
        paid = soft if self.soco.gated else self.soco.scores(self.raw)
        return float(self.state["multiplier"]) * (prices * paid).sum()

    @torch.no_grad()
    def fade(self, step: int) -> None:
        """In the first half of stage 3: what the exact plan would leave out now, multiplied by a factor that falls."""
        stage, through = self.soco.stage(step)
        if stage == 2 and not self.state["fixed_at"]:
            self.choose(self.soco.scores(self.raw))
            self.state["keep"].copy_(1 - min(1.0, 2 * through) * (1 - self.state["chosen"]))

    @torch.no_grad()
    def after(self, step: int) -> bool:
        """The controller's step; in the middle of stage 3 the set is fixed."""
        if self.state["fixed_at"]:
            return False
        stage, through = self.soco.stage(step + 1)
        if stage == 2 and through >= 0.5:
            scores = self.soco.scores(self.raw)
            self.choose(scores)
            self.state["keep"].copy_(self.state["chosen"])
            self.state["fixing"].copy_(scores)
            self.state["fixed_at"].fill_(step + 1)
        elif stage < 2:
            # s ≤ 1 until stage 3: else matrices that cost nothing grow while their neighbours shrink as wholes
            self.raw.clamp_(max=self.soco.begin())
            if stage == 1:
                self.choose(self.soco.scores(self.raw))
            error = self.ratio(self.counted(step)) - self.wanted(step)
            self.state["integral"] += self.soco.dual / self.soco.steps * error
            self.state["integral"].clamp_min_(0)
            self.state["multiplier"].copy_((self.state["integral"] + DAMPING * self.soco.dual * error).clamp_min(0))
        return False

    def choose(self, scores: Tensor) -> None:
        """Which directions the exact plan of the scores keeps: all of the matrices that are dense in it."""
        plan = self.gates.harden(scores, self.problem.budget, self.fixed, _least(self.soco, self.gates))
        for name, place in self.gates.slices.of.items():
            kept, offset, choice = torch.ones(place.stop - place.start), 1.0, plan.choices.get(name)
            if choice is not None:
                kept = torch.zeros_like(kept)
                kept[plan.learned[name]["order"][: choice.counts["rank"]]] = 1
            elif name in self.fixed:  # dense, and without a bias: an offset would make it larger than it was
                offset = 0.0
            self.state["chosen"][place], self.state["open"][place] = kept, float(choice is not None)
            self.state["keep_offset"][self.gates.outputs.of[name]] = offset * self.soco.deviation
