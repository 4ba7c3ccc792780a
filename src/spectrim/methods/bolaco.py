"""Bolaco: projection of outputs by pooled covariances, ranks by Bayesian search (Ji et al., arXiv 2405.10616).

`pooled_covariance` (equation 2; with one covariance: AFM, LoRD). C and x̄ being covariance and mean of the inputs,

    W x ≈ W x̄ + U_r U_rᵀ W (x − x̄),    U the eigenvectors of W C Wᵀ,

so left = U_r, right = U_rᵀ W, and a bias (I − U_r U_rᵀ) W x̄ is added. C and x̄ are means over groups of 32 sequences, of
the covariance within each and of its mean: the spread between groups is left out, as published. Needs C (while it is
collected 2 in² numbers, float64); one float64 `eigh` of min(out, in).

`bayesian` (equation 8). All matrices of a role share one number, q and k together; v stays dense. A Gaussian process
with expected improvement proposes these numbers, and each proposal is measured on the model:

    perplexity + 1e-3 · KL(compressed ‖ dense), summed over the tokens of a sequence, mean over sequences.

Needs the model in memory; costs `evaluations` forward passes over the validation windows and as many installed plans.
Each finished trial is remembered: a run that was killed proposes the same again and goes on.

Deviations. Numbers are shares up to a common factor, which the budget decides: every plan tried spends the whole of it,
where the paper allows up to 10 points less. The process is optuna's (Matérn 5/2, length scales and noise fitted), with
quasi-random first points. Validation windows are the first of calibration. Covariances are merged exactly.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectrim.calibrate.statistics import State, Statistic
from spectrim.core import budget, distributed
from spectrim.core.linalg import directions
from spectrim.core.meter import window_losses
from spectrim.core.plan import Candidate, Choice, Measured, Plan, Target, Tensors, Units
from spectrim.core.registry import Allocator, Decomposer, Live, Problem, Sees, Statistics, allocator, decomposer

logger = logging.getLogger(__name__)

TOGETHER = {"q": "q+k", "k": "q+k"}  # roles that share one number
ATTENTION = ("q+k", "o")  # numbers that start at half


@dataclass(frozen=True)
class _Pooled(Statistic):
    """A mean over groups of `group` sequences; one of fewer than 2 tokens has no covariance and is left out."""

    group: int = 32
    where = "input"
    by_sequence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group is {self.group}: sequences pooled to one covariance, at least 1")

    @property
    def together(self) -> int:
        """A group."""
        return self.group

    def sums(self, state: State) -> State:
        """Those over groups, a last one that is not full among them."""
        self._close(state)
        return state

    def start(self, width: int, device: torch.device) -> State:
        """Empty sums: of the running group its sequences, tokens and mean; over groups their number and total."""
        sizes = dict.fromkeys(("groups", "sequences", "tokens"), ()) | dict.fromkeys(("mean", "total"), (width,))
        return {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}

    def update(self, state: State, *values: Float[Tensor, "tokens in"]) -> None:
        """Add one sequence, and after the last one of a group the group."""
        if len(values[0]):
            self._merge(state, values[0].double())
        state["sequences"] += 1
        if state["sequences"] >= self.group:
            self._close(state)

    def _merge(self, state: State, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "in"]:
        """Move the group's mean; how far the sequence's lies from the one before."""
        apart = x.mean(0) - state["mean"]
        state["tokens"] += len(x)
        state["mean"] += apart * (len(x) / state["tokens"])
        return apart

    def _close(self, state: State) -> None:
        if state["tokens"] >= 2:
            state["total"] += self._of_group(state)
            state["groups"] += 1
        for name in state.keys() - {"groups", "total"}:
            state[name].zero_()

    def _of_group(self, state: State) -> Tensor:
        return state["mean"]

    def result(self, state: State) -> Tensor:
        """Total over number; a last group that is not full counts as one. ValueError for fewer than 2 tokens."""
        total, groups = state["total"], state["groups"]
        if state["tokens"] >= 2:
            total, groups = total + self._of_group(state), groups + 1
        if groups == 0:
            raise ValueError(f"{type(self).__name__} of fewer than 2 tokens: calibrate on longer or more sequences")
        return total / groups


@dataclass(frozen=True)
class PooledMean(_Pooled):
    """Mean over groups of the token mean, float64."""


@dataclass(frozen=True)
class PooledCovariance(_Pooled):
    """Mean over groups of the unbiased covariance of the tokens within each, in × in, float64."""

    def start(self, width: int, device: torch.device) -> State:
        """The same sums, of matrices, and Σ (x − mean)(x − mean)ᵀ over the running group."""
        square = {name: torch.zeros(width, width, dtype=torch.float64, device=device) for name in ("scatter", "total")}
        return super().start(width, device) | square

    def _merge(self, state: State, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "in"]:
        before = state["tokens"].clone()
        apart = super()._merge(state, x)
        centred = x - x.mean(0)
        state["scatter"].addmm_(centred.T, centred)
        state["scatter"].addr_(apart * (before * len(x) / state["tokens"]), apart)
        return apart

    def _of_group(self, state: State) -> Tensor:
        return state["scatter"] / (state["tokens"] - 1)


@dataclass(frozen=True)
class OffsetCandidate(Candidate):
    """Rank units with a bias that keeps the mean output at every rank; `tensors()` has that mean too: `output_mean`."""

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """The factors, and `offset` = (I − U_r U_rᵀ) W x̄."""
        tensors, cut = self.tensors(), super().cut(choice)
        left, mean = tensors["left"][:, : choice.counts["rank"]], tensors["output_mean"]
        return {module: {**made, "offset": mean - left @ (left.T @ mean)} for module, made in cut.items()}


@decomposer("pooled_covariance")
@dataclass(frozen=True)
class PooledCovarianceSVD(Decomposer):
    """Projection of the outputs on the main directions of their pooled covariance, their mean kept by a bias."""

    group: int = 32

    def __post_init__(self) -> None:
        PooledCovariance(self.group)  # which checks it

    scalable = False  # the offset is that of the directions left out, as they are

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Pooled covariance and mean of the inputs."""
        return (PooledCovariance(self.group), PooledMean(self.group))

    @property
    def adds_bias(self) -> bool:
        """Yes: the offset."""
        return True

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """Rank units: scores are standard deviations of the output. No errors: Σ‖y − y′‖² has more than those parts."""
        (part,) = target.parts
        weight, measured = weights[part.module], stats[part.module]
        left, energies = directions(weight, measured[PooledCovariance(self.group)])
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        mean = measured[PooledMean(self.group)].to(weight.device, torch.float64)
        tensors = {"left": left.to(dtype), "output_mean": (weight.double() @ mean).to(dtype)}
        units = Units("rank", energies.sqrt(), None, part.out_features + part.in_features)
        return self.restore(target, (units,), lambda: tensors, lambda: weights, dict)

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate, with the cost of its bias where the dense module has none."""
        fixed = sum(part.out_features for part in target.parts if not part.bias)
        return OffsetCandidate(target, units, tensors, weights, fixed_cost=fixed, statistics=statistics)


@allocator("bayesian")
@dataclass(frozen=True)
class Bayesian(Allocator):
    """Shares for each role, found by trying plans on the model.

    evaluations: plans tried; initial: of these, quasi-random ones, after two fixed ones. layers: groups of consecutive
    blocks with numbers of their own. lowest: the smallest share proposed (the largest is 1), before the common factor.
    dense: roles that stay so. multiple: ranks are multiples of it. sequences: validation windows, the first ones (None:
    all); with pool > 0, of that many windows those whose perplexity varies most over `trials` random plans.
    """

    evaluations: int = 50
    initial: int = 5
    layers: int = 1
    lowest: float = 0.2
    dense: tuple[str, ...] = ("v",)
    multiple: int = 1
    divergence_weight: float = 1e-3
    sequences: int | None = 16
    pool: int = 0
    trials: int = 20
    needs = ()
    sees: ClassVar[Sees] = "model"

    def __post_init__(self) -> None:
        for name, least in {"evaluations": 1, "initial": 0, "layers": 1, "multiple": 1, "pool": 0, "trials": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 < self.lowest < 1:
            raise ValueError(f"lowest is {self.lowest}: the smallest share proposed lies between 0 and 1")
        if not 0 <= self.divergence_weight < math.inf:
            raise ValueError(f"divergence_weight is {self.divergence_weight}: it must be 0 (perplexity alone) or more")
        if self.sequences is not None and self.sequences < 1:
            raise ValueError(f"sequences is {self.sequences}: at least 1 window validates (null: all)")
        if self.pool and (self.sequences is None or self.pool < self.sequences):
            raise ValueError(f"pool is {self.pool}, sequences {self.sequences}: they are taken of at least as many")

    @property
    def grain(self) -> int:
        """One step of rank."""
        return self.multiple

    def check(self, problem: Problem) -> None:
        """Raise ValueError without optuna, for too many layers, and when what stays dense leaves too little."""
        with _optuna():
            space = Space(problem, self.dense, self.layers, self.multiple)
            space.plan(dict.fromkeys(space.numbers, 1.0))

    def allocate(self, problem: Problem) -> Plan:
        """The best plan tried. Raises ValueError without optuna, when what stays dense leaves too little for the rest
        (naming the largest ratio), for fewer blocks than `layers`, and when no plan gave a finite objective.
        """
        self.check(problem)
        with _optuna():
            if problem.budget >= problem.dense:
                return Plan({}, problem.budget, problem.dense)
            assert problem.live is not None
            space = Space(problem, self.dense, self.layers, self.multiple)
            seeds = torch.randint(2**31, (3,), generator=problem.generator).tolist()
            windows = self._windows(problem, problem.live, space, seeds[0])
            found = list(self._search(space, _Measured(problem, problem.live, windows), seeds[1:]))
        values = [value for _, value in found]
        best, failed = values.index(min(values)), sum(map(math.isinf, values))
        if failed == len(found):
            raise ValueError(f"none of the {failed} plans tried gives a finite perplexity and divergence")
        tried = f"{len(found)} plans tried, {failed} of them without a finite objective"
        note = f"bayesian: {tried}; best {values[best]:.6g}, number {best + 1}; equal shares {values[0]:.6g}"
        return replace(found[best][0], notes=(note,))

    def _search(self, space: Space, measured: _Measured, seeds: Sequence[int]) -> Iterator[tuple[Plan, float]]:
        """Every plan tried and its objective (infinite where it is no number), in order."""
        import optuna

        first = [*self._fixed(space), *self._drawn(space, self.initial, seeds[0])]
        values = optuna.distributions.FloatDistribution(self.lowest, 1.0)
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seeds[1], n_startup_trials=len(first)))
        for shares in first:
            study.enqueue_trial(shares)
        known: list[float] = []
        for i in range(self.evaluations):
            trial = study.ask(dict.fromkeys(space.numbers, values))
            # by the first process's search: another machine might round its own differently
            plan = space.plan(distributed.agreed(partial(dict[str, float], trial.params)))
            losses = measured(plan)
            value = float(losses["loss"].mean().exp() + self.divergence_weight * losses["divergence"].mean())
            if math.isfinite(value):
                known.append(value)
            else:
                logger.warning("plan %d of the search gives an objective of %s: it counts as the worst", i + 1, value)
            # not as a failure, which the process would not learn from, and might propose again and again
            failed = None if known else optuna.trial.TrialState.FAIL
            study.tell(trial, value if math.isfinite(value) else max(known, default=None), failed)
            space.problem.progress("allocate", i + 1, self.evaluations)
            yield plan, value if math.isfinite(value) else math.inf

    def _fixed(self, space: Space) -> list[dict[str, float]]:
        """Equal shares; and, as published, half for attention and the kept share for the FFN."""
        kept = max(self.lowest, space.problem.budget / space.problem.dense)
        half = dict.fromkeys(ATTENTION, max(self.lowest, 0.5))
        split = {name: half.get(name.partition("/")[0], kept) for name in space.numbers}
        even = dict.fromkeys(space.numbers, kept)
        return [even] if even == split else [even, split]

    def _drawn(self, space: Space, count: int, seed: int) -> list[dict[str, float]]:
        """Quasi-random shares."""
        engine = torch.quasirandom.SobolEngine(len(space.numbers), scramble=True, seed=seed)
        points = self.lowest + (1 - self.lowest) * engine.draw(1 + count, dtype=torch.float64)
        return [dict(zip(space.numbers, point, strict=True)) for point in points[:count].tolist()]

    def _windows(self, problem: Problem, live: Live, space: Space, seed: int) -> list[int]:
        """Which calibration windows validate."""
        if not self.pool:
            return list(range(sum(map(len, live.batches(self.sequences)))))
        available = sum(map(len, live.batches()))
        if self.pool > available:
            raise ValueError(f"pool is {self.pool}, but calibration has {available} windows: raise calibrate.sequences")
        measured, found = _Measured(problem, live, list(range(self.pool))), []
        for i, shares in enumerate(self._drawn(space, self.trials, seed)):
            perplexities = measured(space.plan(shares))["loss"].exp()
            if perplexities.isfinite().all():
                found.append(perplexities)
            problem.progress("choose windows", i + 1, self.trials)
        if len(found) < 2:
            raise ValueError(f"{len(found)} of {self.trials} random plans give finite perplexities: no spread is known")
        order = torch.sort(torch.stack(found).var(0), descending=True, stable=True).indices
        return sorted(order[: self.sequences].tolist())


@contextmanager
def _optuna() -> Iterator[None]:
    """Within, optuna says nothing, nor that some of it is experimental. Raises ValueError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("allocator 'bayesian' needs optuna: pip install 'spectrim[search]'") from error
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


class Space:
    """The numbers searched: one for each role (q and k together) and group of blocks (ValueError: more than these)."""

    def __init__(self, problem: Problem, dense: Sequence[str], layers: int, multiple: int):
        self.problem, self.dense, self.multiple = problem, dense, multiple
        blocks = 1 + max(block for target in problem.targets for block in target.blocks)
        if layers > blocks:
            raise ValueError(f"layers is {layers}, but there are {blocks} blocks to divide")
        self.owners: dict[str, str | None] = {}  # by target; None: dense
        for target in problem.targets:
            name = TOGETHER.get(target.role, target.role)
            name = name if layers == 1 else f"{name}/{target.blocks[0] * layers // blocks}"
            self.owners[target.name] = None if target.role in dense else name
        self.numbers = sorted({owner for owner in self.owners.values() if owner is not None})

    def plan(self, shares: Mapping[str, float]) -> Plan:
        """The plan that spends the budget at these shares, up to a common factor. Raises ValueError as `allocate`."""
        problem = self.problem
        weights = {name: math.inf if owner is None else shares[owner] for name, owner in self.owners.items()}
        try:
            units = budget.even_ranks(
                problem.targets, problem.budget, problem.format, self.multiple, weights=weights, fixed=problem.fixed
            )
        except ValueError as error:
            raise ValueError(f"{error} (dense: {', '.join(self.dense) or 'none'})") from error
        return budget.rank_plan(problem.targets, units, problem.format, problem.budget, problem.fixed)


class _Measured:
    """What a plan loses on some of the calibration windows, one number a window; remembered."""

    def __init__(self, problem: Problem, live: Live, windows: list[int]):
        self.problem, self.live, self.windows = problem, live, windows
        whole = live.batches(max(windows) + 1)
        self.batches = torch.cat(whole)[windows].split(len(whole[0]))

    @cached_property
    def dense(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The states entering and leaving the blocks of the dense model, by batch; this process's share of them."""
        entered = {i: self.live.enter(self.batches[i]) for i in distributed.share(range(len(self.batches)))}
        blocks = self.live.blocks
        return {i: (state, self.live.run(self.batches[i], state, 0, blocks)) for i, state in entered.items()}

    def __call__(self, plan: Plan) -> Mapping[str, Tensor]:
        """`loss`: nats a token; `divergence`: KL(with the plan ‖ dense), nats summed over the window."""
        choices = {name: asdict(plan.choices[name]) for name in sorted(plan.choices)}
        return self.problem.remember("bayesian", {"choices": choices, "on": self.windows}, lambda: self._measure(plan))

    @torch.no_grad()
    def _measure(self, plan: Plan) -> dict[str, Tensor]:
        live, found = self.live, torch.zeros(len(self.windows), 2, dtype=torch.float64)
        dense = self.dense
        with live.installed(plan):
            for number, (entered, expected) in dense.items():
                ids = self.batches[number]
                state = live.run(ids, entered, 0, live.blocks)
                for i in range(len(ids)):
                    one = slice(i, i + 1)  # the logits of one window at a time
                    logits, others = live.logits(ids[one], state[one])[0], live.logits(ids[one], expected[one])[0]
                    place = number * len(self.batches[0]) + i
                    found[place] = torch.tensor(window_losses(logits, others, ids[i, 1:]), dtype=torch.float64)
        distributed.add_up(found)
        return {"loss": found[:, 0].clone(), "divergence": found[:, 1].clone()}
