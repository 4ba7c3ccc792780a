"""Pooled statistics against brute force, projection against its error formula, and the search on a small stack."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim import recipe
from spectrim.core import budget
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Problem
from spectrim.methods.bolaco import Bayesian, PooledCovariance, PooledCovarianceSVD, PooledMean, Space

FEW = Bayesian(evaluations=8, initial=3, sequences=4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


# --- statistics ---


def sequences(count: int, width: int = 5) -> list[Tensor]:
    """Of different lengths, each about a place of its own."""
    return [3 * random(width, seed=i) + random(4 + i % 3, width, seed=100 + i) for i in range(count)]


def measured(statistic: Any, given: list[Tensor]) -> Tensor:
    state = statistic.start(given[0].shape[1], torch.device("cpu"))
    for x in given:
        statistic.update(state, x)
    found = statistic.result(state)
    assert torch.equal(found, statistic.result(state)), "reading changes nothing"
    return found


@pytest.mark.parametrize("count", [1, 3, 4, 8, 10])
def test_statistics_are_means_over_groups(count: int) -> None:
    given = sequences(count)
    groups = [torch.cat(given[i : i + 4]) for i in range(0, count, 4)]
    assert torch.allclose(measured(PooledMean(4), given), torch.stack([g.mean(0) for g in groups]).mean(0))
    covariances = torch.stack([torch.cov(g.T) for g in groups])
    assert torch.allclose(measured(PooledCovariance(4), given), covariances.mean(0), rtol=1e-10)


def test_merging_is_exact_where_sums_would_lose_all() -> None:
    given = [1e9 + x for x in sequences(6)]
    whole = torch.cov(torch.cat(given).T - 1e9)
    assert torch.allclose(measured(PooledCovariance(32), given), whole, rtol=1e-6)


def test_groups_too_small_for_a_covariance_are_left_out() -> None:
    given = [*sequences(4), random(1, 5, seed=9)]
    for statistic in (PooledCovariance(4), PooledMean(4)):
        assert torch.equal(measured(statistic, given), measured(statistic, given[:4]))
        assert torch.equal(measured(statistic, [given[0], given[0][:0]]), measured(statistic, given[:1]))
        with pytest.raises(ValueError, match="fewer than 2 tokens"):
            measured(statistic, given[4:])
        assert statistic.by_sequence and statistic.where == "input"


# --- projection ---

SHAPES = pytest.mark.parametrize("shape", [(8, 12), (12, 8), (10, 10)], ids=["wide", "tall", "square"])


def tokens(width: int) -> Tensor:
    return random(60, width, seed=3) @ random(width, width, seed=4) + 2 * random(width, seed=5)


def decomposed(shape: tuple[int, int], given: list[Tensor], bias: bool = False) -> tuple[Tensor, Candidate]:
    method, weight = PooledCovarianceSVD(), random(*shape, seed=6)
    target = Target("layer", "up", (0,), (Part("layer", *shape, "x", bias),))
    stats = {statistic: measured(statistic, given) for statistic in method.needs}
    return weight, method.decompose(target, {"layer": weight}, {"layer": stats})


def approximated(candidate: Candidate, rank: int, x: Tensor) -> Tensor:
    cut = candidate.cut(Choice({"layer": "low_rank"}, {"rank": rank}, bias=True))["layer"]
    return x @ (cut["left"] @ cut["right"]).T + cut["offset"]


@SHAPES
def test_the_error_is_that_of_the_directions_left_out(shape: tuple[int, int]) -> None:
    x = tokens(shape[1])
    weight, candidate = decomposed(shape, list(x.split(9)))
    y, centred = x @ weight.T, (x - x.mean(0)) @ weight.T
    values = torch.linalg.eigvalsh(torch.cov(y.T)).flip(0).clamp_min(0)
    scores = candidate.rank_units.scores.square()
    assert torch.allclose(scores, values[: min(shape)], atol=1e-9 * float(values[0]))
    assert candidate.rank_units.errors is None
    for rank in range(min(shape) + 1):
        error = float((y - approximated(candidate, rank, x)).square().sum())
        assert error == pytest.approx((len(x) - 1) * float(values[rank:].sum()), rel=1e-8, abs=1e-8)
        best = torch.linalg.svdvals(centred)[rank:].square().sum()  # of any projection about the mean
        assert error == pytest.approx(float(best), rel=1e-8, abs=1e-8)


@SHAPES
def test_at_the_mean_every_rank_is_exact_and_all_directions_are_everywhere(shape: tuple[int, int]) -> None:
    given = list(tokens(shape[1]).split(9)) * 8  # two groups
    weight, candidate = decomposed(shape, given)
    mean = measured(PooledMean(), given)[None]
    for rank in range(min(shape) + 1):
        assert torch.allclose(approximated(candidate, rank, mean), mean @ weight.T, atol=1e-9)
    other = random(5, shape[1], seed=8)
    assert torch.allclose(approximated(candidate, min(shape), other), other @ weight.T, atol=1e-9)
    left = candidate.tensors()["left"]
    assert torch.allclose(left.T @ left, torch.eye(min(shape), dtype=torch.float64), atol=1e-10)


def test_a_module_with_a_bias_pays_nothing_for_the_offset() -> None:
    given = list(tokens(12).split(9))
    method = PooledCovarianceSVD()
    assert method.adds_bias
    for bias, fixed in ((True, 0), (False, 8)):
        candidate = decomposed((8, 12), given, bias)[1]
        again = method.restore(candidate.target, candidate.units, candidate.tensors, candidate.weights, dict)
        choice = again.first(fixed + 3 * 20)
        assert candidate.fixed_cost == again.fixed_cost == fixed and choice.counts == {"rank": 3}
        assert budget.count(choice, candidate.target) == fixed + 60
        assert torch.equal(again.cut(choice)["layer"]["offset"], candidate.cut(choice)["layer"]["offset"])


# --- shares and ranks: published allocations of a model with 32 blocks, hidden size 4096, FFN 11008 ---

PUBLISHED = {  # ranks of q and k, o, gate, up, down (None: dense); share kept of the matrices of the blocks
    "20 % 5x1": ([(744, 1616, 2512, 2408, None)], 0.7985),
    "30 % 5x1": ([(656, 1392, 2128, 2352, 2312)], 0.6993),
    "20 % 5x4": ([(680, 1728, 2960, None, None), (968, 1888, 2536, 2640, 2632), (408, 1488, None, 2272, 2864),
                  (656, 496, 2824, 2448, 2280)], 0.7992),
    "30 % 5x4": ([(1016, 1632, 2376, 2384, 2384), (840, 1632, 2384, 2376, 2384), (408, 992, 2376, 2384, 2384),
                  (408, 560, 2384, 1896, 1792)], 0.6989),
}  # fmt: skip
ROLES = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "gate": (43, 16), "up": (43, 16), "down": (16, 43)}


def stack(blocks: int, scale: int, roles: Mapping[str, tuple[int, int]] = ROLES) -> list[Target]:
    return [
        Target(f"b.{b}.{r}", r, (b,), (Part(f"b.{b}.{r}", scale * out, scale * width, r),))
        for b in range(blocks)
        for r, (out, width) in roles.items()
    ]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_ranks_come_of_their_shares(name: str) -> None:
    rows, keep = PUBLISHED[name]
    targets = stack(4, 256)  # equal blocks: one for each group
    numbers = ("q+k", "o", "gate", "up", "down")
    found = {t.name: rows[t.blocks[0] % len(rows)][numbers.index({"q": "q+k", "k": "q+k"}.get(t.role, t.role))]
             for t in targets if t.role != "v"}  # fmt: skip
    wanted = {name: rank for name, rank in found.items() if rank is not None}
    costs = {t.name: t.parameters for t in targets}
    costs |= {t.name: budget.rank_cost("low_rank", t.parts[0], wanted[t.name]) for t in targets if t.name in wanted}
    spent = sum(costs.values())
    assert spent / sum(t.parameters for t in targets) == pytest.approx(keep, abs=5e-5)
    space = Space(Problem(targets, spent, "low_rank", rng()), ("v",), len(rows), 8)
    shares = {space.owners[t.name]: costs[t.name] / t.parameters for t in targets}
    plan = space.plan({name: math.inf if share == 1 else share for name, share in shares.items() if name})
    assert {name: choice.counts["rank"] for name, choice in plan.choices.items()} == wanted
    assert plan.spent == spent


# --- the search ---

HIDDEN, WORDS = 16, 24
SHAPE = dict.fromkeys("qkvo", (16, 16)) | {"up": (32, 16), "down": (16, 32)}


class Stack:
    """A model of a few blocks that stands in for a real one: roles q and k have rank 2, all others full rank.

    breaks: which of the plans tried give numbers that are not finite, counted from 1 (0: the dense model).
    """

    def __init__(self, blocks: int = 2, windows: int = 8):
        self.targets = stack(blocks, 1, SHAPE)
        self.weights = {t.name: random(*SHAPE[t.role], seed=i).float() / 5 for i, t in enumerate(self.targets)}
        for name in self.weights:
            if name[-1] in "qk":
                u, s, v = torch.linalg.svd(self.weights[name])
                self.weights[name] = (u[:, :2] * s[:2]) @ v[:2]
        self.table = 2 * random(WORDS, HIDDEN, seed=99).float()
        self.blocks, self.breaks, self.plans = blocks, tuple[int, ...](), list[Plan]()
        self.ids = torch.arange(windows)[:, None].repeat(1, 12)
        for i in range(11):  # words drawn from the model's own distribution
            rows = self.logits(self.ids, self.run(self.ids, self.enter(self.ids), 0, blocks))[:, i].softmax(-1)
            self.ids[:, i + 1] = torch.multinomial(rows, 1, generator=rng(i))[:, 0]

    def batches(self, sequences: int | None = None, length: int | None = None) -> list[Tensor]:
        return list(self.ids[:sequences, :length].split(3))

    def enter(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def run(self, ids: Tensor, state: Tensor, start: int, stop: int) -> Tensor:
        for b in range(start, stop):
            w = {role: self.weights[f"b.{b}.{role}"] for role in SHAPE}
            gates = torch.sigmoid((state @ w["q"].T) * (state @ w["k"].T))
            state = state + (gates * (state @ w["v"].T)).cumsum(1) @ w["o"].T / 4
            state = state + F.relu(state @ w["up"].T) @ w["down"].T
        return state * math.nan if len(self.plans) in self.breaks else state

    def logits(self, ids: Tensor, state: Tensor) -> Tensor:
        return state @ self.table.T / 8

    @contextmanager
    def installed(self, plan: Plan) -> Iterator[None]:
        before = dict(self.weights)
        self.plans.append(plan)
        for name, choice in plan.choices.items():
            u, s, v = torch.linalg.svd(before[name], full_matrices=False)
            rank = choice.counts["rank"]
            self.weights[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
        try:
            yield
        finally:
            self.weights = before

    built = swapped = installed


class Memory:
    """A `remember` that keeps everything, and says what was asked for."""

    def __init__(self, killed: float = math.inf) -> None:
        self.killed, self.kept, self.asked = killed, dict[str, Mapping[str, Tensor]](), list[str]()

    def __call__(self, name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> Any:
        key = repr((name, fields))
        if len(self.asked) == self.killed:
            raise KeyboardInterrupt
        self.asked.append(key)
        return self.kept[key] if key in self.kept else self.kept.setdefault(key, make())

    def objectives(self) -> list[float]:
        found = map(self.kept.__getitem__, self.asked)
        return [float(each["loss"].mean().exp() + 1e-3 * each["divergence"].mean()) for each in found]


def problem(model: Stack, ratio: float = 0.4, seed: int = 0, **more: Any) -> Problem:
    allowed = budget.allowed(model.targets, ratio)
    return Problem(more.pop("targets", model.targets), allowed, "pivot", rng(seed), live=model, **more)


def test_the_best_plan_tried_is_taken_and_each_spends_the_budget() -> None:
    model, memory = Stack(), Memory()
    plan = FEW.allocate(problem(model, remember=memory))
    values = memory.objectives()
    assert len(values) == len(model.plans) == 8
    assert plan.choices == model.plans[values.index(min(values))].choices
    for tried in model.plans:
        picked = [(tried.choices.get(t.name), t) for t in model.targets]
        spent = sum(t.parameters if choice is None else budget.count(choice, t) for choice, t in picked)
        assert spent == tried.spent <= tried.budget == budget.allowed(model.targets, 0.4)
        assert tried.budget - spent < 48
        assert not any(name.endswith(".v") for name in tried.choices)
        ranks = [tried.choices[f"b.{b}.{role}"].counts["rank"] for b in (0, 1) for role in "qk"]
        assert max(ranks) - min(ranks) <= 2
    assert min(values) < 0.97 * values[0], "better than equal shares: q and k have rank 2"
    assert "8 plans tried, 0 of them" in plan.notes[0] and f"{min(values):.6g}" in plan.notes[0]


def test_perplexity_and_divergence_are_those_of_the_formula() -> None:
    model, memory = Stack(), Memory()
    Bayesian(evaluations=1, sequences=5).allocate(problem(model, remember=memory))
    ids, (even,) = model.ids[:5], model.plans
    dense = model.logits(ids, model.run(ids, model.enter(ids), 0, 2)).double().log_softmax(-1)
    (kept,) = memory.kept.values()
    with model.installed(even):
        ours = model.logits(ids, model.run(ids, model.enter(ids), 0, 2)).double().log_softmax(-1)
    loss = [-sum(float(ours[i, t, ids[i, t + 1]]) for t in range(11)) / 11 for i in range(5)]
    divergence = (ours.exp() * (ours - dense)).sum((1, 2))
    assert torch.allclose(kept["loss"], torch.tensor(loss, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(kept["divergence"], divergence, rtol=1e-4)
    assert float(divergence.min()) > 0
    memory = Memory()  # and of a model that loses nothing
    model.installed = lambda plan: nullcontext()  # type: ignore[method-assign, assignment]
    Bayesian(evaluations=1, sequences=3).allocate(problem(model, remember=memory))
    (kept,) = memory.kept.values()
    assert torch.equal(kept["divergence"], torch.zeros(3, dtype=torch.float64))


def test_the_same_seed_makes_the_same_trace_whatever_the_order_of_targets() -> None:
    memories = [Memory() for _ in range(3)]
    model, verbosity = Stack(), optuna.logging.get_verbosity()
    one = FEW.allocate(problem(model, remember=memories[0]))
    other = FEW.allocate(problem(model, targets=model.targets[::-1], remember=memories[1]))
    Bayesian(evaluations=5, initial=3, sequences=4).allocate(problem(model, seed=1, remember=memories[2]))
    assert one == other and memories[0].asked == memories[1].asked
    assert memories[0].asked[:5] != memories[2].asked
    assert optuna.logging.get_verbosity() == verbosity, "as talkative afterwards as before"


def test_a_run_that_was_killed_goes_on_with_the_same_proposals() -> None:
    whole, memory, model = Memory(), Memory(killed=6), Stack()
    expected = FEW.allocate(problem(Stack(), remember=whole))
    with pytest.raises(KeyboardInterrupt):
        FEW.allocate(problem(model, remember=memory))
    memory.asked, memory.killed = [], math.inf
    assert FEW.allocate(problem(model, remember=memory)) == expected
    assert memory.asked == whole.asked and len(model.plans) == 8, "none was tried twice"


def test_plans_that_break_the_model_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    model.breaks = (1, 7)
    with caplog.at_level(logging.WARNING):
        plan = FEW.allocate(problem(model))
    assert "8 plans tried, 2 of them" in plan.notes[0]
    assert caplog.text.count("it counts as the worst") == 2 and "plan 7" in caplog.text
    assert plan.choices in [tried.choices for i, tried in enumerate(model.plans, start=1) if i not in model.breaks]
    model = Stack()
    model.breaks = tuple(range(9))  # and one that is broken itself
    with pytest.raises(ValueError, match="none of the 3 plans"):
        Bayesian(evaluations=3, sequences=2).allocate(problem(model))
    with pytest.raises(ValueError, match="0 of 2 random plans"):
        Bayesian(evaluations=3, sequences=2, pool=4, trials=2).allocate(problem(model))


def test_windows_are_those_that_vary_most() -> None:
    model, memory = Stack(), Memory()
    Bayesian(evaluations=1, initial=0, sequences=3, pool=8, trials=4).allocate(problem(model, remember=memory))
    *random_ones, last = (memory.kept[key] for key in memory.asked)
    spread = torch.stack([each["loss"].exp() for each in random_ones]).var(0)
    assert len(random_ones) == 4 and len(last["loss"]) == 3
    assert f"'on': {sorted(spread.topk(3).indices.tolist())}" in memory.asked[-1]


def test_groups_of_blocks_have_numbers_of_their_own() -> None:
    model = Stack(4)
    space = Space(problem(model), ("v",), 2, 1)
    assert space.numbers == sorted(f"{name}/{i}" for name in ("q+k", "o", "up", "down") for i in (0, 1))
    plan = space.plan({name: 0.2 if name.endswith("/0") else 1.0 for name in space.numbers})
    ranks = [plan.choices[f"b.{b}.up"].counts["rank"] if f"b.{b}.up" in plan.choices else 16 for b in range(4)]
    assert abs(ranks[0] - ranks[1]) <= 1 and abs(ranks[2] - ranks[3]) <= 1 and ranks[1] + 5 < ranks[2]
    with pytest.raises(ValueError, match="layers is 5, but there are 4 blocks"):
        Bayesian(layers=5).allocate(problem(model))
    assert Bayesian(evaluations=4, sequences=2, layers=2, multiple=4).allocate(problem(model)).choices


def test_ratio_0_tries_nothing_and_too_large_a_ratio_is_refused_before_anything_runs() -> None:
    model = Stack()
    plan = FEW.allocate(problem(model, ratio=0.0))
    assert not plan.choices and plan.spent == plan.budget and not model.plans
    with pytest.raises(ValueError, match=r"ratio too large.*largest possible ratio here is 0\.\d+.*dense: v, up, down"):
        Bayesian(dense=("v", "up", "down")).allocate(problem(model, ratio=0.6))
    with pytest.raises(ValueError, match=r"largest possible ratio here is 0\.0"):
        Bayesian(dense=tuple(SHAPE)).allocate(problem(model, ratio=0.1))
    assert not model.plans


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'spectrim\[search\]'"):
        FEW.allocate(problem(model))
    assert not model.plans


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"evaluations": 0}, "evaluations is 0"),
        ({"lowest": 1.0}, "lowest is 1.0"),
        ({"divergence_weight": math.nan}, "divergence_weight is nan"),
        ({"pool": 3}, "pool is 3, sequences 16"),
        ({"pool": 20, "trials": 1}, "trials is 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Bayesian(**settings)
    with pytest.raises(ValueError, match="group is 0"):
        PooledCovarianceSVD(0)


@pytest.mark.parametrize("name", ["bolaco", "bolaco-5x4", "pooled"])
def test_the_recipes(name: str) -> None:
    asked = recipe.build(name)
    (group,) = asked.groups
    assert (group.format, group.decompose[0].method) == ("plain", "pooled_covariance")
    if name != "pooled":
        assert asked.allocator(group) == Bayesian(multiple=1, layers=4 if name == "bolaco-5x4" else 1)
