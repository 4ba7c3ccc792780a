"""LPAF's second step: plain SVD where nothing was pruned, exact at the rank of W_s, best in its own norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectrim
from spectrim.calibrate.statistics import Fisher, FisherColumns
from spectrim.core import registry
from spectrim.core.plan import Candidate, Choice, Part, Target
from spectrim.core.registry import Decomposer
from spectrim.methods.lpaf import GradientSize, SparsityAwareSVD, metric
from spectrim.methods.svd import FisherSVD, PlainSVD
from tests.families import FAMILIES, VOCABULARY, linears

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
SHAPES = pytest.mark.parametrize("shape", [(14, 22), (16, 16), (26, 12)], ids=["wide", "square", "tall"])
KINDS = pytest.mark.parametrize("kind", ["fisher", "taylor", "nnz"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(shape: tuple[int, int], density: float = 0.4) -> Tensor:
    """With an input of no weights and an output of none."""
    weight = random(*shape) * (random(*shape, seed=1) > 0).double()
    weight = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(2)) < density * 2, weight, 0.0)
    weight[:, 3], weight[5] = 0, 0
    return weight


def gradients(shape: tuple[int, int]) -> list[Tensor]:
    size = (random(*shape, seed=5) + random(shape[1], seed=6)).exp()
    return [random(*shape, seed=7 + seed) * size for seed in range(4)]


def statistics(method: SparsityAwareSVD, shape: tuple[int, int]) -> dict[Any, Tensor]:
    found = {}
    for statistic in method.needs:
        state = statistic.start(shape[1], torch.device("cpu"))
        for gradient in gradients(shape):
            statistic.update(state, gradient)
        found[statistic] = statistic.result(state)
    return found


def candidate(method: Decomposer, weight: Tensor, stats: dict[Any, Tensor]) -> Candidate:
    target = Target("layer", "up", (0,), (Part("layer", len(weight), weight.shape[1], "x"),))
    return method.decompose(target, {"layer": weight}, {"layer": stats})


def aware(kind: Any, weight: Tensor) -> Candidate:
    method = SparsityAwareSVD(kind)
    return candidate(method, weight, statistics(method, (len(weight), weight.shape[1])))


def product(made: Candidate, rank: int) -> Tensor:
    cut = made.cut(Choice({"layer": "low_rank"}, {"rank": rank}))["layer"]
    return cut["left"] @ cut["right"]


def defined(kind: str, weight: Tensor) -> Tensor:
    """Σ_o I_oj M_oj, a number at a time."""
    found = torch.zeros(weight.shape[1], dtype=torch.float64)
    of_each = gradients((len(weight), weight.shape[1]))
    for o in range(len(weight)):
        for j in range(weight.shape[1]):
            if weight[o, j] != 0:
                found[j] += {
                    "fisher": sum(float(g[o, j]) ** 2 for g in of_each),
                    "taylor": sum(abs(float(g[o, j] * weight[o, j])) for g in of_each),
                    "nnz": 1.0,
                }[kind]
    return found


def test_what_it_measures() -> None:
    assert registry.decomposers()["sparsity_aware_svd"] is SparsityAwareSVD
    assert SparsityAwareSVD().needs == (Fisher(),)
    assert SparsityAwareSVD("taylor").needs == (GradientSize(),) and GradientSize().needs_gradient
    assert SparsityAwareSVD("nnz").needs == () and SparsityAwareSVD().keeps == ()


@SHAPES
@KINDS
def test_units_are_those_of_the_weighted_matrix(shape: tuple[int, int], kind: str) -> None:
    weight = pruned(shape)
    importance = defined(kind, weight)
    scores = torch.linalg.svdvals(weight * importance.sqrt())
    (units,) = aware(kind, weight).units
    torch.testing.assert_close(units.scores, scores, rtol=1e-4, atol=1e-5 * float(scores[0]))
    assert units.kind == "rank" and units.errors is None and units.cost == sum(shape)


@SHAPES
@KINDS
def test_nearer_in_its_own_norm_than_plain_svd_and_exact_from_the_rank_on(shape: tuple[int, int], kind: str) -> None:
    weight = pruned(shape)
    weight[:, 9] = weight[:, 8]
    made, plain, scale = aware(kind, weight), candidate(PlainSVD(), weight, {}), defined(kind, weight).sqrt()
    for rank in (1, 4, 8):
        own, other = (((weight - product(c, rank)) * scale).norm() for c in (made, plain))
        best = torch.linalg.svdvals(weight * scale)[rank:].norm()
        assert best * (1 - 1e-9) <= own <= best * (1 + 1e-5) and own <= other * (1 + 1e-5)
    full = int(torch.linalg.matrix_rank(weight))
    assert full < min(shape)
    for rank in (full, min(shape)):
        torch.testing.assert_close(product(made, rank), weight, rtol=1e-5, atol=1e-5)


@KINDS
def test_an_input_without_weights_has_no_part(kind: str) -> None:
    weight = pruned((14, 22))
    cut = aware(kind, weight).cut(Choice({"layer": "low_rank"}, {"rank": 4}))["layer"]
    assert not cut["right"][:, 3].any()
    # nor has it a say in the others: without it they come out the same
    rest = [j for j in range(22) if j != 3]
    stats = {s: t[:, rest] for s, t in statistics(SparsityAwareSVD(kind), (14, 22)).items()}
    without = product(candidate(SparsityAwareSVD(kind), weight[:, rest], stats), 4)
    torch.testing.assert_close((cut["left"] @ cut["right"])[:, rest], without, rtol=1e-9, atol=1e-9)


@SHAPES
def test_nothing_pruned_and_equal_weights_are_plain_svd(shape: tuple[int, int]) -> None:
    weight, plain = random(*shape), candidate(PlainSVD(), random(*shape), {})
    equal = candidate(SparsityAwareSVD(), weight, {Fisher(): torch.full(shape, 2.5)})
    none = candidate(SparsityAwareSVD(), weight, {Fisher(): torch.zeros(shape)})
    for made in (equal, none, aware("nnz", weight)):
        for rank in (1, 5, 11):
            torch.testing.assert_close(product(made, rank), product(plain, rank), rtol=1e-8, atol=1e-8)


def test_nothing_pruned_is_fwsvd() -> None:
    weight, state = random(14, 22), FisherColumns().start(22, torch.device("cpu"))
    for gradient in gradients((14, 22)):
        FisherColumns().update(state, gradient)
    fisher = candidate(FisherSVD(), weight, {FisherColumns(): FisherColumns().result(state)})
    for rank in (1, 5, 11):
        torch.testing.assert_close(product(aware("fisher", weight), rank), product(fisher, rank), rtol=1e-4, atol=1e-5)


def test_the_weights_of_what_was_pruned_do_not_count() -> None:
    weight, fisher = pruned((14, 22)), statistics(SparsityAwareSVD(), (14, 22))[Fisher()]
    changed = torch.where(weight == 0, 1e6, fisher)
    one, other = (candidate(SparsityAwareSVD(), weight, {Fisher(): f}) for f in (fisher, changed))
    assert torch.equal(product(one, 4), product(other, 4))


def test_a_live_input_without_importance_still_counts_a_little() -> None:
    weight, fisher = pruned((14, 22)), torch.ones(14, 22)
    fisher[:, 7] = 0
    found = metric(weight, fisher, 100.0)
    live = weight.abs().sum(0) > 0
    assert torch.equal(found > 0, live) and float(found[7]) == pytest.approx(float(found.max()) / 1e4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_is_named(bad: float) -> None:
    fisher = torch.ones(14, 22)
    fisher[2, 3] = bad
    with pytest.raises(ValueError, match="layer: importance is not finite"):
        candidate(SparsityAwareSVD(), random(14, 22), {Fisher(): fisher})


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"largest_spread is 0\.5"):
        SparsityAwareSVD(largest_spread=0.5)
    with pytest.raises(ValueError, match="'fisher', 'taylor' or 'nnz', given 'hessian'"):
        registry.build("decomposer", registry.decomposers(), "sparsity_aware_svd", {"weights": "hessian"})


@KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_model_is_compressed(family: str, kind: str, tmp_path: Path) -> None:
    model = FAMILIES[family].make()
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    with torch.no_grad():
        for i, layer in enumerate(linears(model, blocks).values()):
            weight = layer.get_parameter("weight")
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(i)) < 0.5)
    settings = [f"groups.0.decompose.weights={kind}"]
    result = spectrim.compress(model, "lpaf", ratio=0.3, text=CALIBRATION, settings=settings)
    assert result.plan.choices and result.plan.spent <= result.plan.budget
    plain = FAMILIES[family].make()
    with torch.no_grad():
        assert model(CALIBRATION).logits.isfinite().all()
        assert not torch.equal(model(CALIBRATION).logits, plain(CALIBRATION).logits)
