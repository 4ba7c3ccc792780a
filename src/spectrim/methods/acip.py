"""ACIP: one training run ranks all directions, and any size is cut from the ranking (arXiv 2502.01717).

Read in the public code (merantix-momentum/acip): every direction has a mask q, c at the start, which is switched, not
scaled, and trained straight through with adapters A B beside the product, all weights frozen:

    W′ = U diag(σ g(q)) Vᵀ + s A B,   g = 1 where q > 0, else 0,   ∂g/∂q := 1/c where q > 0, else 0
    L = cross-entropy + ρ_t Σ relu(q),   ρ_t = ρ · growth^⌊t / every⌋

So a direction acts whole until its q reaches 0, and then gets no gradient again. Score after each step: q of what is
alive; minus the steps since death of what is not. At the ratio `highest` the masks are frozen, and the adapters trained
`post` steps more. A budget takes the directions of the largest scores (`learn.harden`); nothing is trained for it.

Needs the whole model in memory, factored (`learn.gates`); costs up to `steps + post` passes forwards and backwards over
`batch` windows, once for all ratios on one work directory. The public code is for models of billions of parameters, c4
and up to 50 000 steps. Ours, as small models and few tokens ask for it:

- the learning rates and the growth of ρ, by which `highest` is reached within `steps`; the adapter's rank is bounded by
  a share of the matrix, for 32 directions of a small one would be most of it; no dropout in it (a run stopped and
  resumed gives the same bytes);
- adapters end as directions of their own and are counted, also while training; there they are left out of all counts;
- a ratio takes the adapters as they were when the size passed it, kept at `snapshots` ratios on the way; there the last
  ones serve all sizes (0), and at small ratios make up for what has not been removed;
- the budget is exact and never exceeded (there: the smallest size above it), every matrix keeps a scored direction, and
  of those that die in one step the one of the larger last q, then the larger σ, stays longer;
- a matrix that ends dense has all its directions again (there: only with `reset_layers`), and its adapter if `merge`.

`order: singular` is the ablation of the public code: score = singular value, nothing is trained.
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
from spectrim.core.budget import rank_cost, rank_within
from spectrim.core.plan import Candidate, Part, Plan, Target
from spectrim.core.registry import Allocator, Problem, Sees, Trainable, allocator
from spectrim.core.spend import rank_steps, single
from spectrim.learn.gates import GatedLinear, Gates, Slices, check_memory
from spectrim.learn.harden import harden, with_learned
from spectrim.learn.training import Batches, Trainer, cross_entropy, passed_back

logger = logging.getLogger(__name__)

COLUMNS = ("loss", "size", "penalty", "alive")


@allocator("acip")
@dataclass(frozen=True)
class ACIP(Allocator):
    """Directions by the order in which a growing penalty switches them off.

    order: learned, or by singular value; steps: at most so many until `highest`, the ratio at which masks are frozen;
    post: steps of the adapters alone; batch; sequences, length: of the calibration windows, those that are trained on;
    constant: c; rate, adapter_rate: AdamW's; penalty, growth, every: ρ; adapter: its rank, at most `share` of the
    matrix's smaller side (0: none); scale: s; snapshots: how many evenly spaced ratios below `highest` have adapters of
    their own; merge: whether a dense matrix gets its adapter; recompute: activations are kept once a block, and made
    again on the way back.
    """

    order: Literal["learned", "singular"] = "learned"
    steps: int = 2000
    post: int = 100
    highest: float = 0.6
    batch: int = 4
    sequences: int | None = None
    length: int | None = None
    constant: float = 0.02
    rate: float = 2e-4
    adapter_rate: float = 2e-4
    penalty: float = 0.01
    growth: float = 1.01
    every: int = 2
    adapter: int = 32
    share: float = 0.0625
    scale: float = 0.5
    snapshots: int = 5
    merge: bool = True
    recompute: bool = False
    needs = ()
    grain: ClassVar[int] = 1

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "batch": self.batch, "every": self.every}
        if self.sequences is not None:
            counts["sequences"] = self.sequences
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: it must be at least 1")
        for name, count in (("post", self.post), ("adapter", self.adapter), ("snapshots", self.snapshots)):
            if count < 0:
                raise ValueError(f"{name} is {count}: it must be at least 0")
        if self.length is not None and self.length < 2:
            raise ValueError(f"length is {self.length}: at least two tokens are needed for a prediction")
        sizes = {"constant": self.constant, "rate": self.rate, "adapter_rate": self.adapter_rate}
        for name, size in {**sizes, "penalty": self.penalty, "scale": self.scale}.items():
            if not 0 < size < math.inf:
                raise ValueError(f"{name} is {size}: it must be above 0")
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth is {self.growth}: the penalty is multiplied by it, so it must be at least 1")
        if not 0 < self.highest < 1:
            raise ValueError(f"highest is {self.highest}: a ratio, the fraction removed, between 0 and 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: the part of a matrix's smaller side is in [0, 1]")

    @property
    def sees(self) -> Sees:
        """The model, to train on it; for singular values the units do."""
        return "model" if self.learns else "units"

    @property
    def learns(self) -> bool:
        """Whether it trains."""
        return self.order == "learned"

    def trained_bytes(self, target: Target, directions: int, entries: int) -> int:
        """Numbers of each direction, and adapters: under way, of every snapshot, and in the plan."""
        part = single(target)
        adapter = 4 * self.rank(part) * (part.out_features + part.in_features)
        return 56 * directions + (5 + 2 * self.snapshots) * adapter

    def rank(self, part: Part) -> int:
        """The rank of a matrix's adapter."""
        return min(self.adapter, int(self.share * min(part.out_features, part.in_features))) if self.learns else 0

    @property
    def passed(self) -> list[float]:
        """The ratios below `highest` whose adapters are kept."""
        return [self.highest * place / (self.snapshots + 1) for place in range(1, self.snapshots + 1)]

    def check(self, problem: Problem) -> None:
        """Raise ValueError for targets that it cannot rank, a budget below the least plan, too little memory."""
        if any(problem.fixed.values()):
            raise ValueError("acip ranks directions alone: use a decomposer that adds no bias, svd or whitened_svd")
        lowest = 0
        for target in problem.targets:
            steps, adapter = rank_steps(problem.format, single(target)), self.rank(single(target))
            lowest += int(steps[: adapter + 1].sum()) if adapter < len(steps) - 1 else target.parameters
        if lowest > problem.budget:
            raise ValueError(
                f"ratio too large: it leaves {problem.budget:,} parameters, but one direction and the adapter of every "
                f"matrix need {lowest:,} of {problem.dense:,}; the largest possible ratio here is "
                f"{(problem.dense - lowest) * 10**4 // problem.dense / 10**4}"
            )
        if self.learns:
            check_memory(problem.targets)

    def allocate(self, problem: Problem) -> Plan:
        """Train, or take the score map that is remembered, whatever its ratio was; then cut it to the budget."""
        assert problem.candidates is not None
        if problem.budget >= problem.dense:
            return Plan({}, problem.budget, problem.dense)
        self.check(problem)
        _check_candidates(problem.candidates)
        if not self.learns:
            scores = {name: candidate.rank_units.scores for name, candidate in problem.candidates.items()}
            return harden(problem.candidates, scores, problem.format, problem.budget)
        fields = {"seed": problem.generator.initial_seed()}
        made = problem.remember("acip", fields, lambda: _Training(self, problem).run())
        problem.slot("acip", fields).clear()  # not before the result is kept
        return _plan(self, problem, made)


def _check_candidates(candidates: Mapping[str, Candidate]) -> None:
    for name, candidate in candidates.items():
        kinds = [units.kind for units in candidate.units]
        if kinds != ["rank"] or type(candidate).settle is not Candidate.settle:
            has = " and ".join(kinds) if kinds != ["rank"] else "other units beside them"
            raise ValueError(f"acip ranks directions alone, {name} has {has}: use svd or whitened_svd")


# --- the mask and its scores ---


def switched(mask: Float[Tensor, "n"], constant: float) -> Float[Tensor, "n"]:
    """g: 1 where the mask is above 0, else 0; its gradient is 1/constant where it is 1, else 0."""
    live = torch.relu(mask)
    return (mask > 0).to(mask) + (live - live.detach()) / constant


def aged(scores: Float[Tensor, "n"], mask: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Scores after a step: the mask of what is alive, else one less than before, 0 being the step of death."""
    return torch.where(mask > 0, mask.to(scores), scores.clamp_max(0) - 1)


def places(scores: Float[Tensor, "n"], last: Float[Tensor, "n"], sigma: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Numbers n to 1 in the order of scores; equal ones by the last mask above 0, then by σ, then as they stand."""
    order = torch.arange(len(scores))
    for key in (sigma.double(), last, scores):
        order = order[torch.sort(key[order], descending=True, stable=True).indices]
    found = torch.empty(len(scores), dtype=torch.float64)
    found[order] = torch.arange(len(scores), 0, -1, dtype=torch.float64)
    return found


# --- adapters ---


@dataclass(frozen=True)
class _Adapters:
    """Where the adapter of each matrix lies in the flat vectors of all A and of all B."""

    parts: Mapping[str, Part]
    ranks: Mapping[str, int]
    a: Slices
    b: Slices

    @staticmethod
    def make(acip: ACIP, targets: Sequence[Target]) -> _Adapters:
        parts = {target.name: single(target) for target in targets}
        ranks = {name: acip.rank(part) for name, part in parts.items()}
        a = Slices.make({name: ranks[name] * part.out_features for name, part in parts.items()})
        b = Slices.make({name: ranks[name] * part.in_features for name, part in parts.items()})
        return _Adapters(parts, ranks, a, b)

    def start(self, seed: int) -> Float[Tensor, "all"]:
        """B as low-rank adapters usually begin: uniform in ±1/√in. A is 0, so that the model is the dense one."""
        draw = torch.Generator().manual_seed(seed)
        flat = 2 * torch.rand(self.b.total, generator=draw) - 1
        for name, place in self.b.of.items():
            flat[place] /= math.sqrt(self.parts[name].in_features)
        return flat

    def of(self, name: str, a: Float[Tensor, "all"], b: Float[Tensor, "other"]) -> tuple[Tensor, Tensor] | None:
        """A and B of a matrix, None where its rank is 0."""
        rank = self.ranks[name]
        return (a[self.a.of[name]].view(-1, rank), b[self.b.of[name]].view(rank, -1)) if rank else None


# --- training ---


class _Training:
    """One training for all budgets."""

    def __init__(self, acip: ACIP, problem: Problem) -> None:
        assert problem.candidates is not None and isinstance(problem.live, Trainable)
        self.acip, self.problem, self.live = acip, problem, problem.live
        self.gates = Gates(problem.live, problem.candidates, problem.format)
        self.adapters = _Adapters.make(acip, problem.targets)
        batches = problem.live.batches(acip.sequences, acip.length)
        self.windows, self.micro = torch.cat(list(batches)), len(batches[0])
        seed = problem.generator.initial_seed()
        self.order = Batches(self.windows, acip.batch, seed)
        device = next(problem.live.model.parameters()).device
        masks = torch.full((self.gates.slices.total,), acip.constant)
        self.mask = masks.to(device, copy=True).requires_grad_()
        self.a = torch.zeros(self.adapters.a.total, device=device, requires_grad=True)
        self.b = self.adapters.start(seed).to(device).requires_grad_()
        self.post = acip.post if len(self.a) else 0
        self.state = {
            "scores": masks.double(), "last": masks.double(), "kept": torch.ones_like(masks),
            "frozen": torch.zeros((), dtype=torch.int64), "size": torch.ones((), dtype=torch.float64),
            "passed": torch.zeros(acip.snapshots, dtype=torch.int64),
            "passed a": torch.zeros(acip.snapshots, len(self.a)), "passed b": torch.zeros(acip.snapshots, len(self.b)),
        }  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        """Train; the score map, the adapters, what was reached at which step, and what each step reported."""
        acip = self.acip
        trainer = Trainer(
            {"mask": self.mask, "a": self.a, "b": self.b},
            {"mask": acip.rate, "a": acip.adapter_rate, "b": acip.adapter_rate},
            self.problem.slot("acip", {"seed": self.problem.generator.initial_seed()}), COLUMNS, self.state,
            clip=0.0, betas=(0.9, 0.999), progress=self.problem.progress,
        )  # fmt: skip
        with self.gates:
            history = trainer.run(acip.steps + self.post, self.update, self.after, stage=self.stage)
            self.gates.set(None)
        kept = {name: value for name, value in self.state.items() if name != "kept"}
        return {**kept, "a": self.a.detach().cpu(), "b": self.b.detach().cpu(), "history": history}

    def stage(self, step: int) -> str:
        """Which of the two."""
        return "adapters" if self.state["frozen"] else "masks"

    def update(self, step: int) -> Mapping[str, float]:
        """Gradients of one step."""
        acip, frozen = self.acip, bool(self.state["frozen"])
        loss = passed_back(self.order.at(step), self.micro, self.loss)
        penalty = torch.zeros(())
        if not frozen:
            penalty = acip.penalty * acip.growth ** (step // acip.every) * torch.relu(self.mask).sum()
            (penalty / distributed.world()).backward()
        alive = self.alive()
        share = float(alive.double().mean())
        return {"loss": loss, "size": self.size(alive), "penalty": float(penalty.detach()), "alive": share}

    def loss(self, chosen: Tensor) -> Tensor:
        """Cross-entropy of some windows."""
        self.gates.set(self.state["kept"] if self.state["frozen"] else switched(self.mask, self.acip.constant))
        for name, module in self.gates.modules.items():
            assert isinstance(module, GatedLinear)
            adapter = self.adapters.of(name, self.a, self.b)
            module.further = None if adapter is None else (self.acip.scale * adapter[0], adapter[1])
        windows = self.windows[chosen]
        return cross_entropy(self.live.answer(windows, self.acip.recompute), windows)

    def alive(self) -> Float[Tensor, "all"]:
        """1 for each direction that acts, 0 for others."""
        return self.state["kept"] if self.state["frozen"] else (self.mask.detach().cpu() > 0).float()

    def size(self, alive: Float[Tensor, "all"]) -> float:
        """Share of the parameters that these and the adapters have; a matrix past its break-even rank counts whole."""
        total = 0
        for name, own in self.gates.slices.split(alive).items():
            part, rank = self.adapters.parts[name], int(own.double().sum()) + self.adapters.ranks[name]
            format = self.problem.format
            smaller = rank <= rank_within(format, part, part.parameters - 1)
            total += rank_cost(format, part, rank) if smaller else part.parameters
        return total / self.gates.dense

    @torch.no_grad()
    def after(self, step: int) -> bool:
        """The score map's step; masks are frozen where `highest` is reached, or no steps are left for them."""
        if self.state["frozen"]:
            return step + 1 >= int(self.state["frozen"]) + self.post
        mask = self.mask.detach().double().cpu()
        self.state["scores"].copy_(aged(self.state["scores"], mask))
        self.state["last"].copy_(torch.where(mask > 0, mask, self.state["last"]))
        alive = self.alive()
        self.state["size"].fill_(self.size(alive))
        for place, ratio in enumerate(self.acip.passed):
            if not self.state["passed"][place] and 1 - float(self.state["size"]) >= ratio:
                self.state["passed"][place] = step + 1
                self.state["passed a"][place] = self.a.detach().cpu()
                self.state["passed b"][place] = self.b.detach().cpu()
        if float(self.state["size"]) > 1 - self.acip.highest and step + 1 < self.acip.steps:
            return False
        self.state["kept"].copy_(alive)
        self.state["frozen"].fill_(step + 1)
        return self.post == 0


# --- the plan ---


def _plan(acip: ACIP, problem: Problem, made: Mapping[str, Tensor]) -> Plan:
    """The exact plan of the score map, with the adapters as further directions."""
    assert problem.candidates is not None and isinstance(problem.live, Trainable)
    gates, adapters = Gates(problem.live, problem.candidates, problem.format), _Adapters.make(acip, problem.targets)
    sigma = torch.cat([candidate.rank_units.scores.cpu() for candidate in gates.candidates.values()])
    scores = places(made["scores"], made["last"], sigma)
    plan = gates.harden(scores, problem.budget, reserved=adapters.ranks)
    a, b = _trained(acip, 1 - (problem.budget + 1) / problem.dense, made)
    learned: dict[str, dict[str, Tensor]] = {}
    for target in problem.targets:
        adapter = adapters.of(target.name, a, b)
        if adapter is not None and (acip.merge or target.name in plan.choices):
            learned[target.name] = {"left": acip.scale * adapter[0], "right": adapter[1].clone()}
    merged = [t for t in problem.targets if t.name in learned and t.name not in plan.choices]
    plan = with_learned(plan, learned, merged)
    curves = {f"acip {name}": made["history"][:, i].tolist() for i, name in enumerate(COLUMNS)}
    return Plan(plan.choices, plan.budget, plan.spent, _notes(acip, problem, made), plan.learned, curves)


def _trained(acip: ACIP, ratio: float, made: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All A and B as they were when the size passed the first kept ratio that is not below this one; else the last."""
    for place, passed in enumerate(acip.passed):
        if ratio <= passed + 1e-9 and made["passed"][place]:
            return made["passed a"][place], made["passed b"][place]
    return made["a"], made["b"]


def _notes(acip: ACIP, problem: Problem, made: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Where the score map does not reach."""
    reached, asked, frozen = 1 - float(made["size"]), 1 - problem.budget / problem.dense, int(made["frozen"])
    notes = []
    if reached < acip.highest:
        notes.append(
            f"acip: the masks reached a ratio of {reached:.3f} in {frozen} steps, not {acip.highest}; more steps or a "
            "larger rate or growth would"
        )
    if asked > reached:
        notes.append(
            f"acip: a ratio of {asked:.3f} is beyond {reached:.3f}, where the masks were frozen: directions alive then "
            "are ranked by their masks alone, and the adapters were not trained without them"
        )
    for note in notes:
        logger.warning(note)
    return tuple(notes)
