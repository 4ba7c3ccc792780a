"""TFWSVD: its units are FWSVD's, its factors those of the solvers, and F outlives the calibration."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectrim
from spectrim.calibrate.statistics import Fisher, FisherColumns, Statistic
from spectrim.core import registry
from spectrim.core.plan import Candidate, Choice, Part, Target
from spectrim.core.registry import Decomposer
from spectrim.core.weighted import als, em, floored, objective
from spectrim.methods.fisher import TFWSVD, FisherCandidate
from spectrim.methods.svd import FisherSVD, PlainSVD
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
SHAPES = pytest.mark.parametrize("shape", [(14, 22), (16, 16), (26, 12)], ids=["wide", "square", "tall"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(statistic: Statistic, shape: tuple[int, int]) -> Tensor:
    """Of gradients whose size differs by entry, over four sequences."""
    size = (random(*shape, seed=5) + random(shape[1], seed=6)).exp()
    state = statistic.start(shape[1], torch.device("cpu"))
    for seed in range(4):
        statistic.update(state, random(*shape, seed=7 + seed) * size)
    return statistic.result(state)


def candidate(method: Decomposer, weight: Tensor, stats: dict[Any, Tensor]) -> Candidate:
    target = Target("layer", "up", (0,), (Part("layer", len(weight), weight.shape[1], "x"),))
    return method.decompose(target, {"layer": weight}, {"layer": stats})


def of_fisher(weight: Tensor, fisher: Tensor, **settings: Any) -> Candidate:
    return candidate(TFWSVD(**settings), weight, {Fisher(): fisher})


def product(made: Candidate, rank: int, format: str = "low_rank") -> Tensor:
    cut = made.cut(Choice({"layer": format}, {"rank": rank}))["layer"]
    assert cut["left"].shape[1] == cut["right"].shape[0] == rank
    return cut["left"] @ cut["right"]


def weighted(weight: Tensor, found: Tensor, fisher: Tensor) -> float:
    return float((floored(fisher, 1e4) * (weight - found).square()).sum())


def test_what_it_measures_and_keeps() -> None:
    method = registry.decomposers()["tfwsvd"]()
    assert isinstance(method, TFWSVD)
    assert method.needs == method.keeps == (Fisher(),)
    assert method.needs[0].needs_gradient and method.kinds == ("rank",)


@SHAPES
def test_units_and_the_answer_at_no_steps_are_those_of_fwsvd(shape: tuple[int, int]) -> None:
    weight, fisher = random(*shape), measured(Fisher(), shape)
    start = candidate(FisherSVD(), weight, {FisherColumns(): measured(FisherColumns(), shape)})
    made = of_fisher(weight, fisher, steps=0)
    (units,), (expected,) = made.units, start.units
    torch.testing.assert_close(units.scores / units.scores[0], expected.scores / expected.scores[0], rtol=1e-6, atol=0)
    assert units.kind == "rank" and units.cost == sum(shape) and units.errors is None
    for rank in (1, 5, 11):
        torch.testing.assert_close(product(made, rank), product(start, rank), rtol=1e-4, atol=1e-5)


@SHAPES
@pytest.mark.parametrize("solver", ["em", "als", "both"])
def test_it_is_nearer_in_its_own_norm_than_fwsvd_and_svd_at_every_rank(shape: tuple[int, int], solver: str) -> None:
    weight, fisher = random(*shape), measured(Fisher(), shape)
    made = of_fisher(weight, fisher, solver=solver)
    plain, start = candidate(PlainSVD(), weight, {}), of_fisher(weight, fisher, steps=0)
    for rank in (1, 5, min(shape) - 1):
        own = weighted(weight, product(made, rank), fisher)
        assert own < 0.95 * weighted(weight, product(start, rank), fisher)
        assert own < 0.9 * weighted(weight, product(plain, rank), fisher)
        assert (weight - product(plain, rank)).norm() < (weight - product(made, rank)).norm()


@SHAPES
def test_settings_are_those_of_the_solver(shape: tuple[int, int]) -> None:
    weight, fisher = random(*shape), measured(Fisher(), shape)
    for solver, steps in (("em", 3), ("als", 2)):
        made = of_fisher(weight, fisher, solver=solver, steps=steps, tolerance=0.0, largest_spread=30.0)
        # the start is FWSVD's under the same cap
        left = made.tensors()["left"][:, :4]
        given = weight, floored(fisher, 30.0), left, left.T @ weight
        fit = {"em": em, "als": als}[solver](*given, steps, 0.0)
        torch.testing.assert_close(product(made, 4), fit.left @ fit.right, rtol=1e-10, atol=1e-10)
        assert len(fit.history) == steps + 1


@FORMATS
def test_each_direction_is_balanced_and_none_is_solved_for_at_the_ends(format: str) -> None:
    weight, fisher = random(14, 22), measured(Fisher(), (14, 22))
    made = of_fisher(weight, fisher)
    cut = made.cut(Choice({"layer": format}, {"rank": 5}))["layer"]
    torch.testing.assert_close(cut["left"].norm(dim=0), cut["right"].norm(dim=1))
    torch.testing.assert_close(product(made, 14, format), weight, rtol=1e-12, atol=1e-12)
    assert product(made, 0, format).shape == (14, 22) and not product(made, 0, format).any()
    dense = made.cut(Choice({"layer": "dense"}, {"rank": 5}))["layer"]
    assert torch.equal(dense["weight"], weight)


def test_factors_of_a_half_precision_weight_are_float32() -> None:
    weight = random(14, 22).bfloat16()
    cut = of_fisher(weight, measured(Fisher(), (14, 22))).cut(Choice({"layer": "low_rank"}, {"rank": 5}))["layer"]
    assert cut["left"].dtype == cut["right"].dtype == torch.float32


def test_learned_values_are_of_the_units_not_of_a_solution() -> None:
    weight, fisher = random(14, 22), measured(Fisher(), (14, 22))
    scale = torch.linspace(0.5, 1.5, 14, dtype=torch.float64)
    made = replace(of_fisher(weight, fisher), learned={"scale": scale})
    left = made.tensors()["left"][:, :5]
    torch.testing.assert_close(product(made, 5), (left * scale[:5]) @ left.T @ weight)


# --- where the answer is known ---


@SHAPES
def test_constant_information_gives_plain_svd(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    for fisher in (torch.full(shape, 2.5), torch.zeros(shape)):
        made, plain = of_fisher(weight, fisher), candidate(PlainSVD(), weight, {})
        for rank in (1, 5, 11):
            torch.testing.assert_close(product(made, rank), product(plain, rank), rtol=1e-8, atol=1e-8)


@SHAPES
@pytest.mark.parametrize("solver", ["em", "als", "both"])
def test_information_of_rank_one_gives_the_svd_scaled_on_both_sides(shape: tuple[int, int], solver: str) -> None:
    weight, rows, columns = random(*shape), random(shape[0], seed=1).exp(), random(shape[1], seed=2).exp()
    made = of_fisher(weight, torch.outer(rows, columns).float(), solver=solver, steps=600, tolerance=0.0)
    u, s, v = torch.linalg.svd(rows.sqrt()[:, None] * weight * columns.sqrt(), full_matrices=False)
    for rank in (1, 6):
        best = (u[:, :rank] * s[:rank]) @ v[:rank] / rows.sqrt()[:, None] / columns.sqrt()
        torch.testing.assert_close(product(made, rank), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constant", [1e-30, 0.3, 1e20])
def test_scaling_the_information_changes_nothing(constant: float) -> None:
    weight, fisher = random(14, 22), measured(Fisher(), (14, 22)).double()
    fisher[0, 0] = 0
    one, other = of_fisher(weight, fisher), of_fisher(weight, constant * fisher)
    for rank in (1, 5):
        torch.testing.assert_close(product(one, rank), product(other, rank), rtol=1e-7, atol=1e-7)


def test_entries_outputs_and_inputs_without_information() -> None:
    weight, fisher = random(14, 22), measured(Fisher(), (14, 22))
    fisher[:3], fisher[:, 5], fisher[7, 7] = 0, 0, 1e12
    for solver in ("em", "als", "both"):
        made = of_fisher(weight, fisher, solver=solver)
        found = product(made, 6)
        assert found.isfinite().all()
        assert float(found.abs().max()) < 100 * float(weight.abs().max())
        assert objective(weight, floored(fisher, 1e4), found, torch.eye(22).double()) < weighted(
            weight, product(of_fisher(weight, fisher, steps=0), 6), fisher
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_information_that_is_not_finite_is_named(bad: float) -> None:
    fisher = measured(Fisher(), (14, 22))
    fisher[2, 3] = bad
    with pytest.raises(ValueError, match="layer: Fisher information is not finite"):
        of_fisher(random(14, 22), fisher)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"largest_spread": 0.5}, "largest_spread is 0.5"),
        ({"largest_spread": float("nan")}, "largest_spread is nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TFWSVD(**settings)


def test_an_unknown_solver_in_a_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'tfwsvd', setting solver: .*'em', 'als' or 'both', given 'adam'"):
        registry.build("decomposer", registry.decomposers(), "tfwsvd", {"solver": "adam"})


# --- in a run ---


def test_a_restored_candidate_gives_the_same_bytes() -> None:
    weight, fisher = random(14, 22).float(), measured(Fisher(), (14, 22))
    method = TFWSVD(solver="both", steps=6)
    made = of_fisher(weight, fisher, solver="both", steps=6)
    again = method.restore(made.target, made.units, made.tensors, made.weights, made.statistics)
    assert isinstance(again, FisherCandidate) and again.method == method
    choice = Choice({"layer": "low_rank"}, {"rank": 4})
    one, other = made.cut(choice)["layer"], again.cut(choice)["layer"]
    assert all(torch.equal(one[name], other[name]) for name in ("left", "right"))


def test_another_ratio_reads_the_information_again_from_the_store(
    llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    options: dict[str, Any] = {"text": CALIBRATION, "work": tmp_path / "work"}
    spectrim.compress(llama_dir, "tfwsvd", ratio=0.2, out=tmp_path / "first", **options)
    assert calls == {"resident": 1}
    spectrim.compress(llama_dir, "tfwsvd", ratio=0.4, out=tmp_path / "second", **options)
    assert calls == {"resident": 1}
    fresh, stored = FAMILIES["llama"].make(), spectrim_logits(tmp_path / "second")
    result = spectrim.compress(fresh, "tfwsvd", ratio=0.4, text=CALIBRATION)
    with torch.no_grad():
        assert torch.equal(fresh(CALIBRATION).logits, stored)
    plain = spectrim.compress(FAMILIES["llama"].make(), "fwsvd", ratio=0.4, text=CALIBRATION)
    assert result.plan.choices == plain.plan.choices and result.plan.spent == plain.plan.spent
    assert not torch.allclose(stored, plain.model(CALIBRATION).logits, atol=1e-4)


def spectrim_logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(CALIBRATION).logits
