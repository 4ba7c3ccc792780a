"""The five baselines against independent computations, and against each other in their own metrics."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.statistics import FisherColumns, Gram, Norm, Statistic
from spectrim.core import budget
from spectrim.core.plan import Choice, Part, Target
from spectrim.core.registry import Problem, decomposers
from spectrim.methods.svd import (
    ActivationSVD,
    FisherSVD,
    InputWeightedSVD,
    MetricSVD,
    PlainSVD,
    Uniform,
    WhitenedSVD,
)

METHODS = (PlainSVD(), ActivationSVD(), FisherSVD(), InputWeightedSVD(), WhitenedSVD())
IDS = [type(method).__name__ for method in METHODS]
SHAPES = pytest.mark.parametrize("shape", [(14, 22), (16, 16), (26, 12)], ids=["wide", "square", "tall"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(width: int) -> Tensor:
    """Inputs, tokens × width: correlated, with channels of very different size and sign."""
    x = random(5 * width, width, seed=1) @ random(width, width, seed=2) / width**0.5
    return x * random(width, seed=3).exp() + random(width, seed=4)


def gradients(shape: tuple[int, int]) -> list[Tensor]:
    scale = random(shape[1], seed=5).exp()
    return [random(*shape, seed=6 + i) * scale for i in range(4)]


def measure(statistic: Statistic, x: Tensor, grads: list[Tensor]) -> Tensor:
    state = statistic.start(x.shape[1], x.device)
    for values in grads if statistic.where == "gradient" else x.split(7):
        statistic.update(state, values)
    return statistic.result(state)


def everything(shape: tuple[int, int]) -> dict[Statistic, Tensor]:
    wanted: list[Statistic] = [Gram(), Norm(power=1), Norm(power=2), FisherColumns()]
    return {statistic: measure(statistic, tokens(shape[1]), gradients(shape)) for statistic in wanted}


def with_fisher(fisher: Tensor) -> dict[Statistic, Tensor]:
    return {FisherColumns(): fisher}


def compressed(method: MetricSVD, weight: Tensor, stats: Mapping[Statistic, Tensor], rank: int) -> Tensor:
    """W′ of `rank`, through the candidate."""
    target = Target("layer", "up", (0,), (Part("layer", len(weight), weight.shape[1], "x"),))
    candidate = method.decompose(target, {"layer": weight}, {"layer": stats})
    cut = candidate.cut(Choice({"layer": "low_rank"}, {"rank": rank}))["layer"]
    return cut["left"] @ cut["right"]


def scores(method: MetricSVD, weight: Tensor, stats: Mapping[Statistic, Tensor]) -> Tensor:
    target = Target("layer", "up", (0,), (Part("layer", len(weight), weight.shape[1], "x"),))
    return method.decompose(target, {"layer": weight}, {"layer": stats}).rank_units.scores


def scaled_svd(weight: Tensor, scale: Tensor, rank: int) -> Tensor:
    """The truncated SVD of W S, S diagonal, times S^-1."""
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] / scale


def weighted(difference: Tensor, metric: Tensor) -> float:
    return float((difference @ metric * difference).sum())


def metrics(shape: tuple[int, int]) -> dict[str, Tensor]:
    """What each method minimises in, computed from the tokens and gradients directly."""
    x = tokens(shape[1])
    fisher = torch.stack(gradients(shape)).square().sum((0, 1))
    return {
        "PlainSVD": torch.eye(shape[1], dtype=torch.float64),
        "ActivationSVD": torch.diag(x.abs().mean(0)),
        "FisherSVD": torch.diag(fisher + 1e-6 * fisher.mean()),
        "InputWeightedSVD": torch.diag(x.square().sum(0)),
        "WhitenedSVD": x.T @ x,
    }


def test_what_each_method_measures() -> None:
    needs = {name: cls().needs for name, cls in decomposers().items() if cls in {type(m) for m in METHODS}}
    assert needs == {
        "svd": (),
        "asvd": (Norm(power=1),),
        "fwsvd": (FisherColumns(),),
        "input_weighted_svd": (Norm(power=2),),
        "whitened_svd": (Gram(),),
    }
    assert {statistic for wanted in needs.values() for statistic in wanted if statistic.needs_gradient} == {
        FisherColumns()
    }


# --- each against its formula ---


@SHAPES
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_plain_svd_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    weight = random(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(compressed(PlainSVD(), weight, {}, rank), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-10)
    assert torch.allclose(scores(PlainSVD(), weight, {}), s, atol=1e-10)


@SHAPES
@pytest.mark.parametrize("alpha", [0.5, 0.25, 1.0])
def test_asvd_is_the_svd_scaled_by_mean_magnitudes(shape: tuple[int, int], alpha: float) -> None:
    weight, scale = random(*shape), tokens(shape[1]).abs().mean(0) ** alpha
    for rank in (1, 5, 12):
        found = compressed(ActivationSVD(alpha), weight, everything(shape), rank)
        assert torch.allclose(found, scaled_svd(weight, scale, rank), atol=1e-9)


@SHAPES
def test_asvd_with_alpha_0_is_plain_svd(shape: tuple[int, int]) -> None:
    weight, stats = random(*shape), everything(shape)
    dead: dict[Statistic, Tensor] = {Norm(power=1): stats[Norm(power=1)].index_fill(0, torch.tensor([1]), 0.0)}
    assert torch.allclose(compressed(ActivationSVD(0.0), weight, dead, 4), compressed(PlainSVD(), weight, {}, 4))


@SHAPES
def test_input_weighted_svd_is_the_svd_scaled_by_norms(shape: tuple[int, int]) -> None:
    weight, scale = random(*shape), tokens(shape[1]).norm(dim=0)
    for rank in (1, 5, 12):
        found = compressed(InputWeightedSVD(), weight, everything(shape), rank)
        assert torch.allclose(found, scaled_svd(weight, scale, rank), atol=1e-9)
    found = scores(InputWeightedSVD(), weight, everything(shape))
    assert torch.allclose(found, torch.linalg.svdvals(weight * scale), rtol=1e-9)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whitened_svd_predicts_the_error_at_the_outputs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = random(*shape).to(dtype), tokens(shape[1])
    target = Target("layer", "up", (0,), (Part("layer", *shape, "x"),))
    candidate = WhitenedSVD().decompose(target, {"layer": weight}, {"layer": everything(shape)})
    (m, n), precise = shape, dtype == torch.float64
    for rank in range(min(shape)):
        choice = candidate.first(rank * (m + n))
        assert choice.counts == {"rank": rank}
        cut = candidate.cut(choice)["layer"]
        difference = weight.double() - cut["left"].double() @ cut["right"].double()
        measured = float((x @ difference.T).square().sum())
        assert choice.error == pytest.approx(measured, rel=1e-9 if precise else 1e-3)


@SHAPES
def test_whitened_svd_is_the_optimum_over_the_tokens(shape: tuple[int, int]) -> None:
    weight, x = random(*shape), tokens(shape[1])
    tails = torch.linalg.svdvals(x @ weight.T).square().flip(0).cumsum(0).flip(0)
    for rank in range(1, min(shape)):
        difference = weight - compressed(WhitenedSVD(), weight, everything(shape), rank)
        assert float((x @ difference.T).square().sum()) == pytest.approx(float(tails[rank]), rel=1e-9)


@SHAPES
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_each_method_is_the_best_in_its_own_metric(method: MetricSVD, shape: tuple[int, int]) -> None:
    weight, stats = random(*shape), everything(shape)
    own = metrics(shape)[type(method).__name__]
    for rank in (2, 6, 10):
        errors = {
            type(other).__name__: weighted(weight - compressed(other, weight, stats, rank), own) for other in METHODS
        }
        least = errors.pop(type(method).__name__)
        assert all(error > 1.001 * least for error in errors.values()), (least, errors)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_only_the_whitened_metric_is_an_error_at_the_outputs(method: MetricSVD) -> None:
    target = Target("layer", "up", (0,), (Part("layer", 14, 22, "x"),))
    candidate = method.decompose(target, {"layer": random(14, 22)}, {"layer": everything((14, 22))})
    (units,) = candidate.units
    assert (units.errors is not None) == isinstance(method, WhitenedSVD)
    if units.errors is not None:
        assert torch.allclose(units.errors, units.scores**2)


# --- Fisher-weighted SVD: the properties its authors state, and those of its floor ---


def fisher_of(shape: tuple[int, int]) -> Tensor:
    return everything(shape)[FisherColumns()]


@SHAPES
def test_fwsvd_is_the_svd_scaled_by_the_root_of_the_fisher_columns(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    fisher = torch.stack(gradients(shape)).square().sum((0, 1))
    importance = torch.sqrt(fisher + 1e-6 * fisher.mean())
    for rank in (1, 5, 12):
        found = compressed(FisherSVD(), weight, everything(shape), rank)
        assert torch.allclose(found, scaled_svd(weight, importance, rank), atol=1e-9)


@SHAPES
def test_a_constant_fisher_gives_plain_svd(shape: tuple[int, int]) -> None:
    weight, constant = random(*shape), with_fisher(torch.full((shape[1],), 3.7, dtype=torch.float64))
    for rank in (1, 5):
        found = compressed(FisherSVD(), weight, constant, rank)
        assert torch.allclose(found, compressed(PlainSVD(), weight, {}, rank), atol=1e-9)


@SHAPES
def test_fwsvd_at_full_rank_is_exact(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    assert torch.allclose(compressed(FisherSVD(), weight, everything(shape), min(shape)), weight, atol=1e-12)


@SHAPES
def test_fwsvd_and_plain_svd_each_win_in_their_own_norm(shape: tuple[int, int]) -> None:
    weight, fisher = random(*shape), fisher_of(shape)
    for rank in (2, 6, 10):
        ours = weight - compressed(FisherSVD(), weight, with_fisher(fisher), rank)
        plain = weight - compressed(PlainSVD(), weight, {}, rank)
        assert weighted(ours, torch.diag(fisher)) < weighted(plain, torch.diag(fisher))
        assert plain.norm() < ours.norm()


@SHAPES
@pytest.mark.parametrize("constant", [1e-30, 0.3, 1e12])
def test_scaling_the_fisher_changes_nothing(shape: tuple[int, int], constant: float) -> None:
    weight, fisher = random(*shape), fisher_of(shape)
    fisher[0] = 0
    for rank in (1, 5):
        one = compressed(FisherSVD(), weight, with_fisher(fisher), rank)
        assert torch.allclose(compressed(FisherSVD(), weight, with_fisher(constant * fisher), rank), one, atol=1e-9)


@SHAPES
def test_the_weighted_error_is_the_sum_of_dropped_squares(shape: tuple[int, int]) -> None:
    weight, fisher = random(*shape), fisher_of(shape)
    importance = torch.diag(fisher + 1e-6 * fisher.mean())
    values = scores(FisherSVD(), weight, with_fisher(fisher))
    assert torch.allclose(values, torch.linalg.svdvals(weight @ importance.sqrt()), rtol=1e-9)
    for rank in range(min(shape)):
        error = weighted(weight - compressed(FisherSVD(), weight, with_fisher(fisher), rank), importance)
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)


def test_dead_columns_are_floored_and_the_spread_is_capped() -> None:
    shape = (14, 22)
    weight, fisher = random(*shape), fisher_of(shape)
    fisher[:3], fisher[5] = 0, 1e12
    for spread in (1e4, 10.0):
        metric = FisherSVD(spread).metric(with_fisher(fisher))
        expected = torch.maximum(fisher + 1e-6 * fisher.mean(), fisher.max() * (1 + 1e-6 / 22) / spread**2)
        assert torch.allclose(metric, expected, rtol=1e-6)
        assert 1 < (metric.max() / metric.min()).sqrt() <= spread * (1 + 1e-9)
    found = compressed(FisherSVD(), weight, with_fisher(fisher), 14)
    assert torch.allclose(found, weight, atol=1e-9)
    nothing = compressed(FisherSVD(), weight, with_fisher(torch.zeros(22, dtype=torch.float64)), 14)
    assert torch.allclose(nothing, weight, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ActivationSVD(-0.5), "alpha is -0.5"),
        (lambda: ActivationSVD(float("nan")), "alpha is nan"),
        (lambda: FisherSVD(0.0), "largest_spread is 0.0"),
        (lambda: Uniform(0), "multiple is 0"),
    ],
)
def test_settings_out_of_range(make, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=reason):
        make()


# --- uniform allocation ---


@pytest.mark.parametrize("format", ["low_rank", "pivot"])
def test_uniform_gives_equal_matrices_equal_ranks(format: str) -> None:
    targets = [Target(name, "q", (0,), (Part(name, 40, 56, name),)) for name in "abcd"]
    allowed = budget.allowed(targets, 0.3)
    plan = Uniform().allocate(Problem(targets, allowed, format, torch.Generator()))
    ranks = [plan.choices[name].counts["rank"] for name in "abcd"]
    within = budget.rank_within(format, targets[0].parts[0], allowed // 4)
    assert set(ranks) <= {within, within + 1}
    assert plan.budget == allowed >= plan.spent


@pytest.mark.parametrize("multiple", [8, 16])
def test_uniform_rounds_ranks_and_its_grain_says_so(multiple: int) -> None:
    targets = [Target(name, "q", (0,), (Part(name, 64, 80, name),)) for name in "ab"]
    plan = Uniform(multiple).allocate(Problem(targets, budget.allowed(targets, 0.4), "pivot", torch.Generator()))
    assert all(choice.counts["rank"] % multiple == 0 for choice in plan.choices.values())
    assert Uniform(multiple).grain == multiple
