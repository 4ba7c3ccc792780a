"""UniRank and the softmax of cosines against their definitions, on spectra made up for the purpose."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy import optimize
from torch import Tensor

from spectrim import recipe
from spectrim.calibrate.statistics import Cosine, SublayerCosine
from spectrim.core import budget, registry, spend
from spectrim.core.plan import Candidate, Part, Plan, Target, Units
from spectrim.core.registry import Problem
from spectrim.methods.svd import Uniform
from spectrim.methods.unirank import CosineSoftmax, UniRank

BOTH = pytest.mark.parametrize("format", ["low_rank", "pivot"])
SEEDS = pytest.mark.parametrize("seed", range(8))
Values = dict[str, tuple[Tensor, Tensor]]
Steps = Sequence[tuple[float, str, int]]
RATIOS = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a made-up model: its shape, spectrum, block and role."""

    shape: tuple[int, int]
    spectrum: Tensor
    block: int = 0
    role: str = "up"


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def falling(length: int, seed: int, power: float = 1.0) -> Tensor:
    """A spectrum like a power law, with noise."""
    noise = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((0.5 + noise) / torch.arange(1, length + 1) ** power).sort(descending=True).values


def problem(
    matrices: Mapping[str, Matrix],
    cosines: Sequence[float | tuple[float, float]],
    ratio: float = 0.4,
    format: str = "low_rank",
    fixed: Mapping[str, int] | None = None,
) -> Problem:
    """What an allocator sees; a block's cosine is one number, or two of its sub-layers."""
    targets, candidates = [], {}
    for name, matrix in matrices.items():
        part = Part(name, *matrix.shape, name)
        targets.append(Target(name, matrix.role, (matrix.block,), (part,)))
        units = Units("rank", matrix.spectrum, None, budget.unit_cost(format, part))
        candidates[name] = Candidate(targets[-1], (units,), dict, dict, format)
    statistics = {
        block: {SublayerCosine(): floats(*value)} if isinstance(value, tuple) else {Cosine(): floats(value)}
        for block, value in enumerate(cosines)
    }
    allowed = budget.allowed(targets, ratio)
    return Problem(targets, allowed, format, torch.Generator(), candidates, statistics, fixed=fixed or {})


def a_model(seed: int) -> tuple[dict[str, Matrix], list[float]]:
    """Matrices of several shapes over three blocks, more than one in a block; their cosines."""
    rng = random.Random(seed)
    matrices = {}
    for i in range(rng.randint(4, 9)):
        m, n = rng.randint(4, 40), rng.randint(4, 40)
        spectrum = falling(min(m, n), 100 * seed + i, rng.uniform(0.2, 1.5)) * 10 ** rng.uniform(-3, 3)
        matrices[f"m{i}"] = Matrix((m, n), spectrum, rng.randrange(3))
    return matrices, [rng.uniform(0.3, 0.99) for _ in range(3)]


def ranks(plan: Plan, asked: Problem) -> dict[str, int | None]:
    return {t.name: plan.choices[t.name].counts["rank"] if t.name in plan.choices else None for t in asked.targets}


def steps(asked: Problem, matrices: Mapping[str, Matrix], cosines: Sequence[float]) -> Steps:
    """(score, name, cost) of every step, best first, names breaking ties; from the formulas alone."""
    found = []
    for name in sorted(matrices):
        (m, n), spectrum = matrices[name].shape, matrices[name].spectrum
        energies = (1 - cosines[matrices[name].block]) * spectrum**2 / (spectrum**2).sum()
        largest, paid = budget.largest_rank(asked.format, Part(name, m, n, name)), 0
        for rank in range(1, largest + 2):
            total = m * n if rank > largest else rank * (m + n) - (rank**2 if asked.format == "pivot" else 0)
            found.append((float(energies[rank - 1]), name, total - paid))
            paid = total
    return sorted(found, key=lambda step: (-step[0], step[1]))


def by_definition(asked: Problem, found: Steps) -> tuple[dict[str, int], dict[str, int]]:
    """Steps of each matrix where all above a threshold are kept, and after the fill; one everywhere comes first."""
    firsts = {name: i for i, (_, name, _) in reversed(list(enumerate(found)))}
    taken, left = dict.fromkeys(firsts, 1), asked.budget - sum(found[i][2] for i in firsts.values())
    threshold, closed = None, set()
    for i, (_, name, cost) in enumerate(found):
        if i == firsts[name]:
            continue
        if name not in closed and cost <= left:
            left, taken[name] = left - cost, taken[name] + 1
        else:
            threshold = dict(taken) if threshold is None else threshold
            closed.add(name)
    return threshold or taken, taken


def kept_steps(plan: Plan, asked: Problem, found: Steps) -> dict[str, int]:
    """The rank of each matrix, or all of its steps where it is dense."""
    lengths = {target.name: sum(step[1] == target.name for step in found) for target in asked.targets}
    return {name: lengths[name] if rank is None else rank for name, rank in ranks(plan, asked).items()}


# --- UniRank against its definition ---


@BOTH
@SEEDS
def test_the_best_scores_of_the_model_are_kept_and_the_rest_of_the_budget_is_filled(seed: int, format: str) -> None:
    matrices, cosines = a_model(seed)
    before: dict[str, int] = {}
    for ratio in sorted(RATIOS, reverse=True):
        asked = problem(matrices, cosines, ratio, format)
        found = steps(asked, matrices, cosines)
        threshold, filled = by_definition(asked, found)
        plan = UniRank().allocate(asked)
        assert kept_steps(plan, asked, found) == filled
        assert all(threshold[name] >= count for name, count in before.items()), "no rank falls with the ratio"
        before = threshold
        scores = {name: [step[0] for step in found if step[1] == name] for name in matrices}
        kept = [score for name, each in scores.items() for score in each[1 : threshold[name]]]
        dropped = [score for name, each in scores.items() for score in each[threshold[name] :]]
        assert not kept or not dropped or min(kept) >= max(dropped)
        assert 0 <= asked.budget - plan.spent < max(sum(m.shape) for m in matrices.values())
        assert plan.choices.keys() <= matrices.keys() and (ratio > 0 or not plan.choices)


@BOTH
@pytest.mark.parametrize("shape", [(24, 24), (20, 36)])
def test_alike_matrices_get_even_ranks(shape: tuple[int, int], format: str) -> None:
    matrices = {f"m{i}": Matrix(shape, falling(min(shape), 0), i) for i in range(5)}
    for ratio in (0.3, 0.5, 0.7):
        asked = problem(matrices, [0.9] * 5, ratio, format)
        even = budget.rank_within(format, asked.targets[0].parts[0], math.floor((1 - ratio) * math.prod(shape)))
        found = ranks(UniRank().allocate(asked), asked).values()
        assert all(rank is not None and abs(rank - even) <= 1 for rank in found)


@SEEDS
def test_raising_the_importance_of_a_matrix_never_lowers_its_rank(seed: int) -> None:
    matrices, _ = a_model(seed)
    matrices = {name: replace(matrix, block=i) for i, (name, matrix) in enumerate(matrices.items())}
    rng, before = random.Random(seed), -1
    cosines = [rng.uniform(0.5, 0.99) for _ in matrices]
    for cosine in (0.999, *sorted((c + 0.003 for c in cosines[1:]), reverse=True), 0.4, 0.0, -0.9):
        asked = problem(matrices, [cosine, *cosines[1:]], 0.5)
        rank = ranks(UniRank().allocate(asked), asked)["m0"]
        taken = budget.largest_rank("low_rank", asked.targets[0].parts[0]) + 1 if rank is None else rank
        assert taken >= before
        before = taken


@SEEDS
@pytest.mark.parametrize("method", [UniRank(), UniRank(cost_mode="per_param"), UniRank(energy_power=1)])
def test_scales_change_nothing(method: UniRank, seed: int) -> None:
    matrices, cosines = a_model(seed)
    plan = method.allocate(problem(matrices, cosines))
    for exponent in (40, 900):  # also where squares overflow or vanish
        scales = {name: 2.0 ** (exponent if i % 2 else -exponent) for i, name in enumerate(matrices)}
        scaled = {name: replace(each, spectrum=each.spectrum * scales[name]) for name, each in matrices.items()}
        assert method.allocate(problem(scaled, cosines)) == plan
    assert method.allocate(problem(matrices, [1 - 0.25 * (1 - c) for c in cosines])) == plan


@SEEDS
@pytest.mark.parametrize("method", [UniRank(), UniRank(cost_mode="per_param"), CosineSoftmax()])
def test_the_order_of_matrices_changes_nothing_not_even_ties(method: Any, seed: int) -> None:
    matrices, cosines = a_model(seed)
    matrices |= {f"twin of {name}": matrix for name, matrix in matrices.items()}
    plan = method.allocate(problem(matrices, cosines))
    names = list(matrices)
    random.Random(seed).shuffle(names)
    assert method.allocate(problem({name: matrices[name] for name in names}, cosines)) == plan


# --- by parameters ---


def values(asked: Problem, matrices: Mapping[str, Matrix], cosines: Sequence[float]) -> Values:
    """Of each matrix: what every step adds to Σ I (1 − relative error), and its cost."""
    found = {}
    for target in asked.targets:
        matrix = matrices[target.name]
        energies = (1 - cosines[matrix.block]) * matrix.spectrum**2 / (matrix.spectrum**2).sum()
        costs = spend.rank_steps(asked.format, target.parts[0])
        last = len(costs) - 1
        found[target.name] = torch.cat([energies[:last], energies[last:].sum(0, keepdim=True)]), costs
    return found


def linear_best(found: Values, allowed: int) -> float:
    """The bound of the linear program, by its dual: one price of a parameter, the first step of each matrix taken."""

    def dual(price: float) -> float:
        profits = ((worth - price * cost.double()).cumsum(0).max() for worth, cost in found.values())
        return float(sum(profits)) + price * allowed

    bounds = (0, max(float((worth / cost).max()) for worth, cost in found.values()))
    return float(optimize.minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-12}).fun)


@BOTH
@SEEDS
def test_by_parameters_what_is_kept_is_the_linear_best_but_for_one_run_of_steps(seed: int, format: str) -> None:
    matrices, cosines = a_model(seed)
    for ratio in (0.2, 0.5):
        asked = problem(matrices, cosines, ratio, format)
        found = values(asked, matrices, cosines)

        def kept(method: Any, asked: Problem = asked, found: Any = found) -> float:
            taken = ranks(method.allocate(asked), asked)
            return sum(float(found[name][0][:rank].sum()) for name, rank in taken.items())

        slopes = {name: spend.hull(worth[1:], cost[1:]) for name, (worth, cost) in found.items()}
        runs = [float(found[n][0][1:][each == slope].sum()) for n, each in slopes.items() for slope in each.unique()]
        best, reached = linear_best(found, asked.budget), kept(UniRank(cost_mode="per_param"))
        assert best + 1e-9 >= reached >= best - max(runs) - 1e-9
        assert reached > kept(Uniform())


def test_by_parameters_a_cheaper_direction_goes_first() -> None:
    matrices = {"large": Matrix((20, 100), falling(20, 1)), "small": Matrix((20, 30), falling(20, 1))}
    asked = problem(matrices, [0.5], 0.6)
    plans = [UniRank(cost_mode=mode).allocate(asked) for mode in ("none", "per_param")]
    of_directions, of_parameters = (kept_steps(plan, asked, steps(asked, matrices, [0.5]))["large"] for plan in plans)
    assert of_directions > of_parameters


# --- importance ---


def test_the_importance_of_a_block_comes_from_its_residual_stream() -> None:
    """A block that changes nothing keeps one rank everywhere; sums over shards are those of all tokens."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = torch.stack([-x[:, 1], x[:, 0], -x[:, 3], x[:, 2], -x[:, 5], x[:, 4]], 1)
    measured = []
    for after, parts in ((x, 1), (turned, 1), (turned, 4)):
        state = Cosine().start(1, x.device)
        for before, then in zip(x.chunk(parts), after.chunk(parts), strict=True):
            Cosine().update(state, before, then)
        measured.append(float(Cosine().result(state)))
    assert measured == pytest.approx([1, 0, 0], abs=1e-12)
    matrices = {name: Matrix((20, 20), falling(20, 3), block) for block, name in enumerate("ab")}
    asked = problem(matrices, measured[:2], 0.45)
    assert ranks(UniRank().allocate(asked), asked) == {"a": 1, "b": None}


def test_blocks_without_any_effect_are_all_alike_and_energy_alone_reads_no_statistics() -> None:
    matrices = {name: Matrix((20, 20), falling(20, 3), block) for block, name in enumerate("ab")}
    asked = problem(matrices, [1.0, 1.0], 0.5)
    assert ranks(UniRank().allocate(asked), asked) == {"a": 5, "b": 5}
    energy, asked = UniRank(importance_power=0.0), replace(asked, statistics=None)
    assert energy.needs == () and ranks(energy.allocate(asked), asked) == {"a": 5, "b": 5}


@SEEDS
def test_powers_are_those_of_the_importance_and_of_the_spectrum(seed: int) -> None:
    matrices, cosines = a_model(seed)
    asked = problem(matrices, [1 - (1 - cosine) ** 3 for cosine in cosines])
    assert UniRank(importance_power=3.0).allocate(problem(matrices, cosines)) == UniRank().allocate(asked)
    roots = {name: replace(matrix, spectrum=matrix.spectrum.sqrt()) for name, matrix in matrices.items()}
    plan = UniRank(energy_power=1).allocate(problem(matrices, cosines))
    assert plan == UniRank().allocate(problem(roots, cosines))


def test_sublayers_have_their_own_importance() -> None:
    roles = ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down", "other")
    matrices = {role: Matrix((20, 20), falling(20, 3), 0, role) for role in roles}
    method = UniRank(granularity="sublayer")
    assert method.needs == (SublayerCosine(),) and UniRank().needs == (Cosine(),)
    for cosines, without in (((0.5, 1.0), roles[5:]), ((1.0, 0.5), roles[:5])):
        asked = problem(matrices, [cosines], 0.6)
        found = ranks(method.allocate(asked), asked)
        assert {role for role, rank in found.items() if rank == 1} == set(without)


# --- edges ---


@pytest.mark.parametrize("mode", ["none", "per_param"])
def test_a_matrix_without_energy_keeps_the_least_rank(mode: Any) -> None:
    matrices = {"dead": Matrix((20, 20), torch.zeros(20)), "alive": Matrix((20, 20), falling(20, 1))}
    asked = problem(matrices, [0.9], 0.5)
    assert ranks(UniRank(cost_mode=mode, least=2).allocate(asked), asked) == {"alive": 8, "dead": 2}
    assert ranks(UniRank(cost_mode=mode, least=0).allocate(asked), asked)["dead"] == 0


def test_a_bias_that_ranks_bring_is_within_the_budget() -> None:
    matrices = {name: Matrix((20, 20), falling(20, i), i) for i, name in enumerate("ab")}
    for method in (UniRank(), UniRank(cost_mode="per_param"), CosineSoftmax()):
        asked = problem(matrices, [0.9, 0.7], 0.5, fixed={"a": 20, "b": 20})
        plan = method.allocate(asked)
        assert plan.spent == sum(budget.count(plan.choices[t.name], t) for t in asked.targets) <= asked.budget
        assert asked.budget - plan.spent < 40 and all(choice.bias for choice in plan.choices.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    matrices = {"good": Matrix((9, 9), falling(9, 0)), "bad": Matrix((9, 9), torch.cat([floats(value), falling(8, 0)]))}
    with pytest.raises(ValueError, match="spectrum of bad has values that are not finite"):
        UniRank().allocate(problem(matrices, [0.9]))
    for method in (UniRank(), CosineSoftmax()):
        with pytest.raises(ValueError, match=r"blocks \(0,\) of good is (nan|inf)"):
            method.allocate(problem({"good": matrices["good"]}, [value]))


def test_what_has_no_ranks_is_named() -> None:
    whole = Target("mlp", "ffn", (0,), (Part("up", 8, 4, "x"), Part("down", 4, 8, "y")))
    candidate = Candidate(whole, (Units("channel", falling(8, 0), None, 8),), dict, dict, "dense")
    asked = Problem([whole], 40, "low_rank", torch.Generator(), {"mlp": candidate}, {0: {Cosine(): floats(0.5)}})
    with pytest.raises(ValueError, match=r"mlp \(role ffn\) has units of kind channel"):
        UniRank().allocate(asked)
    with pytest.raises(ValueError, match=r"mlp \(role ffn\) is no single matrix"):
        CosineSoftmax().allocate(asked)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("unirank", {"granularity": "matrix"}),
        ("unirank", {"energy_power": 3}),
        ("unirank", {"importance_power": -1}),
        ("unirank", {"importance_power": math.inf}),
        ("unirank", {"least": -1}),
        ("cosine_softmax", {"temperature": 0}),
        ("cosine_softmax", {"least": -1}),
    ],
)
def test_settings_that_make_no_sense(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name!r}.*{next(iter(settings))}"):
        registry.build("allocator", registry.allocators(), name, settings)


def test_recipes() -> None:
    expected = {
        "unirank": UniRank(),
        "unirank-sublayer": UniRank(granularity="sublayer"),
        "unirank-energy": UniRank(importance_power=0.0),
        "unirank-per-param": UniRank(cost_mode="per_param"),
        "cosine-softmax": CosineSoftmax(),
    }
    for name, method in expected.items():
        built = recipe.build(name)
        assert built.allocator(built.groups[0]) == method
        assert built.groups[0].format == "plain" and built.groups[0].decompose[0].method == "whitened_svd"


# --- the softmax of cosines ---


@BOTH
def test_equal_cosines_share_evenly(format: str) -> None:
    matrices, _ = a_model(1)
    for ratio in (0.1, 0.35, 0.6):
        asked = problem(matrices, [0.8] * 3, ratio, format)
        assert CosineSoftmax().allocate(asked) == Uniform().allocate(asked)
        asked = problem(matrices, [0.8, 0.2, 0.99], ratio, format)
        assert CosineSoftmax(temperature=1e6).allocate(asked) == Uniform().allocate(asked)


def test_blocks_share_the_ratio_by_a_softmax() -> None:
    cosines, ratio = [0.7, 0.95, 0.8, 0.9], 0.3
    matrices = {f"{block}.{i}": Matrix((90, 110), falling(90, 0), block) for block in range(4) for i in range(2)}
    asked = problem(matrices, cosines, ratio)
    lost = len(cosines) * ratio * torch.softmax(-(1 - floats(*cosines)) / 0.2, 0)
    for name, rank in ranks(CosineSoftmax().allocate(asked), asked).items():
        kept = (rank or 0) * 200 / 9900
        assert abs(kept - (1 - float(lost[matrices[name].block]))) <= 200 / 9900


def test_a_block_that_would_lose_more_than_all_keeps_the_least_rank_and_the_budget_is_used() -> None:
    cosines, ratio = [0.2, 0.3, 0.99], 0.6
    assert len(cosines) * ratio * float(torch.softmax(-(1 - floats(*cosines)) / 0.2, 0)[2]) > 1
    matrices = {f"m{block}": Matrix((60, 60), falling(60, 0), block) for block in range(3)}
    asked = problem(matrices, cosines, ratio)
    found = ranks(plan := CosineSoftmax().allocate(asked), asked)
    assert found["m2"] == 1 and asked.budget - plan.spent < 120
    assert found["m0"] is not None and found["m1"] is not None
    lost = [1 - rank * 120 / 3600 for rank in (found["m0"], found["m1"])]
    assert lost[1] / lost[0] == pytest.approx(math.exp(0.1 / 0.2), abs=0.25), "the others share in proportion"
