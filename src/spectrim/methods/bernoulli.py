"""CAP's second stage: keeping probabilities of directions and entries (Zhou et al., ICLR 2026, arXiv 2505.03801 v3).

Every unit of all matrices, a direction or an entry, has a probability s of being kept. Published, for masks m drawn
from s and the loss ℓ of the model with what m keeps, no gradient through the model:

    g = (m − s) / (s (1 − s) + ε),   δ ← β δ + (1 − β) ℓ,   s ← project(s − rate (ℓ − δ) g),   β = 1 − 1/window

over 3 passes through 128 sequences, window 5, rate 0.05; at the end the largest s are kept, as the budget pays. Since
ℓ is in δ before it is taken off, (ℓ − δ) g is β times an unbiased gradient. Not published: where s starts, the masks
of a step, batches, how units of different cost are projected, ε. `mode = "paper"` has the loop above with our answers:
s starts at the rank of value² / cost among all units, in (0, 1); project(z) is clip(z − v), v ≥ 0 the least one within
the budget Σ cost · s (the nearest point where a unit of cost c counts as c of cost 1; "euclidean": clip(z − v cost));
s is clamped to [0.001, 0.999] in g alone; two masks a step. Millions of probabilities cannot be told apart by some
hundred losses: this mode stays near where it starts.

`mode = "grouped"`, the default, is ours. The units of a matrix and kind, in their order, are cut into buckets of about
one cost, `groups` of them on average, and a mask keeps or leaves buckets. Two logits a matrix are learned, one for its
directions and one for its entries: a bucket at place u of the greedy order (value² / cost, as a share of all cost) has

    s = clip(½ + u / width + logit, 0, 1),   all logits shifted so that the budget is spent.

Only a share `width` of the pool is undecided, the rest is kept or left for sure: with a mere 2 % of chance for every
other bucket, losses of masks scattered 6 times as far (stories260K at 0.2) and the gradient was lost in that. A logit's
gradient is the sum of those of its buckets; a matrix whose kept parts cost as much as itself is dense, in a mask too.

Also ours: `baseline = "leave_one_out"`, the mean of the other masks of the same batch, which takes the difference
between batches out and leaves g unbiased (of K masks: Σ (ℓ − mean) g / (K − 1), as a policy gradient pruner of a
co-author has it, arXiv 2406.10576); `scale`: what (m − s) is divided by, "variance" as published, "deviation" its
root (that pruner), "none": s (1 − s) times the gradient, of least scatter; `normalised`: losses are divided by their
running deviation; the plans at `checks` moments, the greedy start the first, are cut, refitted and run on the same
windows, and the best is returned: never a worse one than the start, on those. With `budget = "bytes"` every plan spends
bytes in its order; the probabilities spend the parameters of the greedy start's plan.

Needs the whole model in memory, factored (`learn.gates`), or at a check W′ of all targets beside it; 16 bytes a unit
of the pool in grouped mode, in paper mode 36 and 5 for each mask. Costs masks × passes runs over the windows, without
gradients, `checks` runs over `trial` of them, and the refitting of as many plans.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from spectrim.core import distributed
from spectrim.core.bytes import reached
from spectrim.core.plan import Plan, Target
from spectrim.core.pool import Pool, project
from spectrim.core.registry import Allocator, Problem, Sees, Slot, Trainable, allocator
from spectrim.core.spend import single
from spectrim.learn.gates import Gates, check_memory
from spectrim.learn.training import Batches, cross_entropy

logger = logging.getLogger(__name__)

Scale = Literal["variance", "deviation", "none"]
COLUMNS = ("loss", "spread", "undecided")
# s is kept this far from 0 and 1 in the estimator.
EDGE = 1e-3
# Updates between two states that a killed run goes on from.
EVERY = 20


@allocator("bernoulli")
@dataclass(frozen=True)
class Bernoulli(Allocator):
    """Directions and entries of all matrices by learned keeping probabilities.

    mode: one logit a matrix and kind (grouped), or one probability a unit (paper); groups, width: of grouped.
    passes: over the windows, `batch` of them an update; sequences, length: of the windows; masks: of an update;
    rate: of an update; window: of the moving baseline; baseline, scale, normalised, projection: see above. relative:
    values² are shares of their sum over their matrix; checks: plans that are tried on `trial` windows. budget: plans
    spend parameters, or bytes, as many as those would take, of values and indices together.
    """

    mode: Literal["grouped", "paper"] = "grouped"
    groups: int = 32
    width: float = 0.0625
    passes: int = 3
    batch: int = 2
    masks: int = 2
    rate: float = 0.1
    window: int = 5
    baseline: Literal["leave_one_out", "moving"] = "leave_one_out"
    scale: Scale = "none"
    normalised: bool = True
    projection: Literal["replicated", "euclidean"] = "euclidean"
    relative: bool = False
    budget: Literal["parameters", "bytes"] = "parameters"
    checks: int = 5
    trial: int = 32
    sequences: int | None = None
    length: int | None = None
    needs = ()
    sees: ClassVar[Sees] = "model"
    grain: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("groups", "passes", "batch", "masks", "window", "trial"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}: it must be above 0; published: 0.05")
        if not 0 < self.width <= 1:
            raise ValueError(f"width is {self.width}: the share of the pool that is undecided is in (0, 1]")
        if self.checks < 2:
            raise ValueError(f"checks is {self.checks}: at least 2, the start and the end")
        if self.baseline == "leave_one_out" and self.masks < 2:
            raise ValueError(
                "masks is 1: leave_one_out compares masks of one batch, at least 2; or set baseline=moving"
            )

    @property
    def learns(self) -> bool:
        """Yes."""
        return True

    def trained_bytes(self, target: Target, directions: int, entries: int) -> int:
        """Places of what is kept; in paper mode probabilities now and at their best, under way and as a result."""
        return (8 if self.mode == "grouped" else 24) * (directions + entries)

    def check(self, problem: Problem) -> None:
        """Raise ValueError for a target that is no single matrix, and where memory does not suffice."""
        for target in problem.targets:
            single(target)
        check_memory(problem.targets, itemsize=10 if self.mode == "grouped" else 30)

    def allocate(self, problem: Problem) -> Plan:
        """Learn, or take what is remembered of the same budget; then the plan of the best probabilities.

        Raises ValueError for candidates without directions or without entries, and when no loss of an update is finite.
        """
        assert problem.candidates is not None and isinstance(problem.live, Trainable)
        if problem.budget >= problem.dense:
            return Plan({}, problem.budget, problem.dense)
        groups = self.groups if self.mode == "grouped" else None
        pool = Pool.make(problem.candidates, problem.format, groups, self.relative)
        spends = problem.budget
        if self.budget == "bytes":
            pool = replace(pool, itemsize=problem.itemsize)
            spends = pool.plan(pool.unit_places(), problem.budget).spent
        policy = Policy(self, pool, spends)
        fields = {"budget": problem.budget, "itemsize": pool.itemsize}
        made = problem.remember("bernoulli", fields, lambda: _Training(policy, problem).run())
        problem.slot("bernoulli", fields).clear()  # not before the result is kept
        plan = pool.plan(policy.order(made["best"]), problem.budget)
        tried, update = made["checks"], int(made["best_at"])
        curves = {f"bernoulli {name}": made["history"][:, i].tolist() for i, name in enumerate(COLUMNS)}
        curves |= {"bernoulli check": tried[:, 1].tolist(), "bernoulli check at": tried[:, 0].tolist()}
        notes = [
            f"bernoulli: the plan after {update} of {int(tried[-1, 0])} updates is kept, loss "
            f"{float(tried[:, 1].min()):.4f} on {int(made['windows'])} calibration windows; greedy start "
            f"{float(tried[0, 1]):.4f}, end {float(tried[-1, 1]):.4f}"
        ]
        if self.budget == "bytes":
            notes.append(reached("bernoulli", plan, problem.targets, problem.itemsize))
        if int(made["skipped"]):
            notes.append(f"bernoulli: {int(made['skipped'])} masks gave no finite loss and were left out")
        return Plan(plan.choices, plan.budget, plan.spent, tuple(notes), plan.learned, curves)


# --- probabilities ---


def weight_of(s: Float[Tensor, "n"], scale: Scale) -> Float[Tensor, "n"]:
    """What (m − s) is multiplied by."""
    clamped = s.clamp(EDGE, 1 - EDGE)
    return (clamped * (1 - clamped)).pow({"variance": -1.0, "deviation": -0.5, "none": 0.0}[scale])


def direction(
    masks: Sequence[Tensor], advantages: Float[Tensor, "masks"], s: Float[Tensor, "n"], scale: Scale
) -> Float[Tensor, "n"]:
    """The mean over masks of advantage · (m − s) / (s (1 − s)), or as `scale` says."""
    total = torch.zeros_like(s)
    for mask, advantage in zip(masks, advantages.tolist(), strict=True):
        total.add_(mask.to(s) - s, alpha=advantage / len(masks))
    return total * weight_of(s, scale)


def left_out(losses: Float[Tensor, "masks"]) -> Float[Tensor, "masks"]:
    """Of each loss what it is above the mean of the others."""
    count = len(losses)
    return (losses - losses.mean()) * (count / (count - 1))


@dataclass(frozen=True)
class Policy:
    """Probabilities within a budget of parameters. Logits: in paper mode they themselves, else one for each segment."""

    settings: Bernoulli
    pool: Pool
    budget: int

    @property
    def grouped(self) -> bool:
        """Whether variables of a segment share a logit."""
        return self.settings.mode == "grouped"

    def start(self) -> Float[Tensor, "logits"]:
        """Those of the greedy order."""
        if not self.grouped:
            return self.probabilities(self.pool.places)
        zeros = torch.zeros(len(self.pool.sizes))
        return zeros - project(self._raw(zeros), self.cost, float(self.budget), inflate=True)[1]

    def probabilities(self, logits: Float[Tensor, "logits"]) -> Float[Tensor, "variables"]:
        """s."""
        return project(self._raw(logits), self.cost, float(self.budget), inflate=self.grouped)[0]

    def _raw(self, logits: Float[Tensor, "logits"]) -> Float[Tensor, "variables"]:
        if not self.grouped:
            return logits
        return 0.5 + self.pool.places / self.settings.width + logits[self.pool.segment]

    def order(self, logits: Float[Tensor, "logits"]) -> Float[Tensor, "units"]:
        """What the units of a plan are taken by: s, or, grouped, what is under the clip, of each unit by itself."""
        if not self.grouped:
            return self.probabilities(logits)
        return self.pool.unit_places() / self.settings.width + self.pool.of_segments(logits)

    def cost(self, kept: Float[Tensor, "variables"]) -> float:
        """Σ cost · s, pivot at soft ranks; grouped: of no target more than it costs dense."""
        each = self.pool.spent(kept)
        return float((torch.minimum(each, self.pool.dense) if self.grouped else each).sum())

    def moved(
        self, logits: Float[Tensor, "logits"], s: Float[Tensor, "variables"], gradient: Float[Tensor, "variables"]
    ) -> Float[Tensor, "logits"]:
        """The logits after a step down the gradient, within the budget again."""
        rate, euclidean = self.settings.rate, self.settings.projection == "euclidean"
        if not self.grouped:
            price = self.pool.average(s)
            return project(
                logits - rate * gradient, self.cost, float(self.budget), price / price.mean() if euclidean else 1.0
            )[0]
        undecided = self.pool.costs * ((s > 0) & (s < 1)) * s * (1 - s) * weight_of(s, self.settings.scale)
        price, step = torch.zeros_like(logits).index_add(0, self.pool.segment, undecided), torch.zeros_like(logits)
        step.index_add_(0, self.pool.segment, gradient)
        if not bool(price.any()):
            return logits
        price = price / price[price > 0].mean()
        if not euclidean:  # the gradient in the metric in which all logits move alike
            step = step / price.clamp_min(0.25)
        push = price.clamp_min(1e-3) if euclidean else torch.ones_like(price)
        stepped = logits - rate * step
        shift = project(self._raw(stepped), self.cost, float(self.budget), push[self.pool.segment], inflate=True)[1]
        return stepped - shift * push


class _Training:
    """One training for one budget."""

    def __init__(self, policy: Policy, problem: Problem) -> None:
        assert problem.candidates is not None and isinstance(problem.live, Trainable)
        self.policy, self.settings, self.problem, self.live = policy, policy.settings, problem, problem.live
        self.pool, self.seed = policy.pool, problem.generator.initial_seed()
        self.gates = Gates(problem.live, problem.candidates, problem.format)
        batches = problem.live.batches(self.settings.sequences, self.settings.length)
        self.windows, self.micro = torch.cat(list(batches)), len(batches[0])
        self.order = Batches(self.windows, self.settings.batch, self.seed)
        self.trial = self.windows[-self.settings.trial :]
        self.updates = math.ceil(self.settings.passes * len(self.windows) / min(self.settings.batch, len(self.windows)))
        self.moments = {round(i * self.updates / (self.settings.checks - 1)) for i in range(self.settings.checks)}
        self.state = {
            "step": torch.zeros((), dtype=torch.int64), "logits": policy.start(),
            "moving": torch.tensor(math.nan, dtype=torch.float64), "spread": torch.zeros((), dtype=torch.float64),
            "skipped": torch.zeros((), dtype=torch.int64), "best": policy.start(),
            "best_at": torch.zeros((), dtype=torch.int64), "checks": torch.zeros(0, 2, dtype=torch.float64),
            "history": torch.zeros(0, len(COLUMNS), dtype=torch.float64),
        }  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        """Learn; a training found in the slot goes on where it was."""
        slot = self.problem.slot("bernoulli", {"budget": self.problem.budget, "itemsize": self.pool.itemsize})
        found = slot.load()
        if found is not None:
            self.state = {name: found[name].clone() for name in self.state}
            logger.info("learning goes on at update %d", int(self.state["step"]))
        stops = sorted(self.moments)
        with torch.no_grad():
            for start, stop in zip([0, *stops], stops, strict=False):
                self.learn(range(max(start, int(self.state["step"])), stop), slot)
                if int(self.state["step"]) == stop and not bool((self.state["checks"][:, 0] == stop).any()):
                    self.check(stop)
                    self.save(slot)
        return {**self.state, "windows": torch.tensor(len(self.trial))}

    def learn(self, steps: range, slot: Slot) -> None:
        """Some updates, with the gates in."""
        with self.gates if len(steps) else nullcontext():
            for step in steps:
                self.update(step)
                self.state["step"] = torch.tensor(step + 1)
                if step % EVERY == EVERY - 1:
                    self.save(slot)

    def save(self, slot: Slot) -> None:
        """Put the state into the slot."""
        if distributed.rank() == 0:
            slot.save(self.state)

    def update(self, step: int) -> None:
        """Masks, their losses, and the step that follows from them."""
        state, s = self.state, self.policy.probabilities(self.state["logits"])
        masks = [self.mask(s, step, k) for k in range(self.settings.masks)]
        losses = torch.zeros(len(masks), dtype=torch.float64)
        chosen = self.windows[self.order.at(step)]
        for k in distributed.share(range(len(masks))):
            with self.gates.folded(self.pool.gates(masks[k].float())):
                losses[k] = self.loss(chosen)
        losses = distributed.add_up(losses)
        finite = losses.isfinite()
        if not bool(finite.any()):
            where = f"update {step} (pass {1 + step * len(chosen) // len(self.windows)})"
            raise ValueError(
                f"no mask of {where} of the policy gradient gave a finite loss: look for windows of calibration text "
                "that the model fails on, or compute in a wider dtype"
            )
        state["skipped"] = state["skipped"] + int((~finite).sum())
        masks, losses = [mask for mask, good in zip(masks, finite.tolist(), strict=True) if good], losses[finite]
        advantages = self.advantages(losses)
        state["logits"] = self.policy.moved(state["logits"], s, direction(masks, advantages, s, self.settings.scale))
        undecided = float(((s > 0) & (s < 1)).sum())
        row = torch.tensor([[float(losses.mean()), float(state["spread"].sqrt()), undecided]], dtype=torch.float64)
        state["history"] = torch.cat([state["history"], row])
        self.problem.progress(f"policy gradient: loss {float(losses.mean()):.4g}", step + 1, self.updates)

    def mask(self, s: Tensor, step: int, k: int) -> Tensor:
        """Mask k of an update: which variables it keeps; the same at every run."""
        draw = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_009 + k) % 2**63)
        return torch.rand(len(s), generator=draw) < s

    def loss(self, ids: Int[Tensor, "batch length"]) -> float:
        """Cross entropy of the model as it is, nats a token."""
        return sum(
            float(cross_entropy(self.live.answer(some), some)) * len(some) for some in ids.split(self.micro)
        ) / len(ids)

    def advantages(self, losses: Float[Tensor, "masks"]) -> Float[Tensor, "masks"]:
        """Losses over their baseline, and over their running deviation where that is asked for."""
        state, moving = self.state, float(self.state["moving"])
        if self.settings.baseline == "leave_one_out":
            found = left_out(losses) if len(losses) > 1 else torch.zeros_like(losses)
        else:
            kept = 1 - 1 / self.settings.window
            mean = float(losses.mean())
            moving = mean if math.isnan(moving) else kept * moving + (1 - kept) * mean
            state["moving"] = torch.tensor(moving, dtype=torch.float64)
            found = losses - moving
        square = found.square().mean()
        state["spread"] = 0.9 * state["spread"] + 0.1 * square if bool(state["spread"] > 0) else square
        return found / state["spread"].sqrt() if self.settings.normalised and bool(state["spread"] > 0) else found

    def check(self, step: int) -> None:
        """The loss of the plan at hand, with the gates out; the best so far is kept."""
        plan = self.pool.plan(self.policy.order(self.state["logits"]), self.problem.budget)
        loss = torch.zeros((), dtype=torch.float64)
        with self.live.swapped(self.built(plan)):
            for ids in distributed.share(self.trial.split(self.micro)):
                loss += self.loss(ids) * len(ids) / len(self.trial)
        loss = distributed.add_up(loss)
        tried = self.state["checks"][:, 1]
        if not len(tried) or float(loss) < float(tried.min()) or not bool(tried.isfinite().any()):
            self.state["best"], self.state["best_at"] = self.state["logits"].clone(), torch.tensor(step)
        row = torch.tensor([[float(step), float(loss)]], dtype=torch.float64)
        self.state["checks"] = torch.cat([self.state["checks"], row])
        logger.info("after %d updates the plan's loss is %.4f", step, float(loss))

    def built(self, plan: Plan) -> dict[str, nn.Module]:
        """A plain layer of the weight that a plan makes of each target, by module; not of those that stay dense."""
        made: dict[str, nn.Module] = {}
        for name, choice in plan.choices.items():
            candidate = replace(self.gates.candidates[name], learned=plan.learned[name])
            ((module, parts),) = candidate.cut(choice).items()
            dense = self.live.model.get_submodule(module)
            weight = parts["left"] @ parts["right"]
            weight.view(-1).index_add_(0, parts["entries"], parts["values"].to(weight))
            made[module] = _Layer(weight.to(dense.weight), dense.bias)
        return made


class _Layer(nn.Module):
    """A linear layer of a given weight."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return linear(x, self.weight, self.bias)
