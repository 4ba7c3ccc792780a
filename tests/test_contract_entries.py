"""The contract of decomposers with entry units and of the allocators that need them, default settings.

Helpers are those of test_contract.py, which has the contract of ranks alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.calibrate.statistics import Statistic
from spectrim.core import budget, registry
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Allocator, Decomposer, Problem
from spectrim.model import apply, modules
from tests.test_contract import FORMATS, OF_ENTRIES, built, measured, rng, spent, targets_of_blocks, tokens, weights

DECOMPOSERS = {name: kind for name, kind in registry.decomposers().items() if "entry" in kind().kinds}
ALLOCATORS = {name: registry.allocators()[name] for name in OF_ENTRIES}
# settings with which what iterates ends at its tolerance: a matrix of rank 3 takes more iterations than others
CONVERGED = {"robust_pca": {"iterations": 1000}}
EACH = pytest.mark.parametrize("name", sorted(DECOMPOSERS))
EACH_ALLOCATOR = pytest.mark.parametrize("name", sorted(ALLOCATORS))
EACH_DECOMPOSER = pytest.mark.parametrize("decomposer", sorted(DECOMPOSERS))
WEIGHTS = pytest.mark.parametrize("kind", sorted(weights()))


def decomposed(name: str, weight: Tensor, module: str = "layer", method: Any = None) -> Candidate:
    out, width = weight.shape
    target = Target(module, "up", (0,), (Part(module, out, width, "x"),))
    method = method or DECOMPOSERS[name]()
    stats = {statistic: measured(statistic, tokens(width), out) for statistic in method.needs}
    made: Candidate = method.decompose(target, {module: weight}, {module: stats})
    return made


def at(format: str, rank: int, entries: int) -> Choice:
    return Choice({"layer": budget.WITH_ENTRIES[format]}, {"rank": rank, "entry": entries})


def sizes(candidate: Candidate) -> dict[str, int]:
    return {"rank": 0} | {units.kind: len(units.scores) for units in candidate.units}


def some(candidate: Candidate) -> list[tuple[int, int]]:
    """Counts of directions and entries: none, some, all."""
    most = sizes(candidate)
    return [(rank, entries) for rank in sorted({0, most["rank"] // 2}) for entries in (0, most["entry"] // 3)]


def product(cut: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The weight that a cut stands for, float64."""
    made = torch.zeros(shape, dtype=torch.float64)
    made.view(-1)[cut["entries"]] = cut["values"].double()
    return made + cut["left"].double() @ cut["right"].double() if "left" in cut else made


# --- decomposers ---


def test_there_is_something_to_test() -> None:
    assert DECOMPOSERS and ALLOCATORS


@EACH
def test_a_decomposer_is_one(name: str) -> None:
    method = DECOMPOSERS[name]()
    assert isinstance(method, Decomposer) and hash(method) == hash(DECOMPOSERS[name]())
    assert all(isinstance(statistic, Statistic) for statistic in method.needs)
    assert method.kinds == tuple(units.kind for units in decomposed(name, weights()["wide"]).units)


@EACH
@WEIGHTS
def test_units_are_best_first(name: str, kind: str) -> None:
    candidate = decomposed(name, weights()[kind])
    for units in candidate.units:
        assert units.scores.isfinite().all() and (units.scores >= 0).all() and (units.scores.diff() <= 0).all()
        assert units.kind != "entry" or units.cost == 1
    places = candidate.tensors()["entries"]
    assert len(places) == sizes(candidate)["entry"] == len(places.unique())
    assert all(tensor.isfinite().all() for tensor in candidate.tensors().values())


@EACH
@WEIGHTS
def test_all_units_reproduce_the_weight(name: str, kind: str) -> None:
    weight, method = weights()[kind], DECOMPOSERS[name](**CONVERGED.get(name, {}))
    candidate = decomposed(name, weight, method=method)
    gap = weight.double() - product(candidate.cut(at("low_rank", *sizes(candidate).values()))["layer"], weight.shape)
    tolerance = getattr(method, "tolerance", 0.0) + 1e-6  # that of float32 factors
    assert gap.norm() <= tolerance * weight.double().norm()


@EACH
@WEIGHTS
def test_more_units_fit_better(name: str, kind: str) -> None:
    weight = weights()[kind].double()
    candidate, errors = decomposed(name, weight), []
    for share in (0.0, 0.25, 0.5, 0.75, 0.95):
        choice = candidate.fit(int(share * weight.numel()))
        errors.append(float((weight - product(candidate.cut(choice)["layer"], weight.shape)).norm()))
    assert errors[0] == pytest.approx(float(weight.norm())) and errors[-1] <= 0.25 * errors[0] + 1e-9


@EACH
@FORMATS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["wide", "tall", "one row", "zero", "rank 3"])
def test_predicted_cost_is_what_is_built(name: str, kind: str, bias: bool, format: str) -> None:
    weight = weights()[kind]
    candidate, given = decomposed(name, weight), torch.randn(len(weight), generator=rng()) if bias else None
    (part,) = candidate.target.parts
    candidate = candidate.priced(format, budget.unit_cost(format, part)) if sizes(candidate)["rank"] else candidate
    settled = [
        candidate.settle(Choice({"layer": format}, {"rank": rank}))
        for rank in range(budget.largest_rank(format, part) + 1)
    ]
    for rank, choice in enumerate(settled):
        assert budget.count(choice, candidate.target) <= budget.rank_cost(format, part, rank)
    for choice in [*settled, *(at(format, *counts) for counts in some(candidate))]:
        module = built(candidate, choice, torch.float32, given)
        size = sum(parameter.numel() for parameter in module.parameters()) - (len(weight) if bias else 0)
        assert size == budget.count(choice, candidate.target)


@EACH
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tall", "rank 3", "zero", "one row"])
def test_a_module_gives_the_product_and_survives_saving(
    name: str, kind: str, dtype: torch.dtype, format: str, tmp_path: Path
) -> None:
    weight, bias = weights()[kind], torch.randn(len(weights()[kind]), generator=rng()).to(dtype)
    candidate, x = decomposed(name, weight), torch.randn(5, weight.shape[1], generator=rng())
    for counts in some(candidate):
        choice = at(format, *counts)
        module = built(candidate, choice, dtype, bias)
        assert module.bias is not None and torch.equal(module.bias, bias), "the bias is kept"
        y = module(x.to(dtype))
        exact = x.double() @ product(candidate.cut(choice)["layer"], weight.shape).T + bias.double()
        limit = 1e-4 if dtype == torch.float32 else 0.1
        assert (y.double() - exact).abs().max() <= limit * max(1.0, float(exact.abs().max()))
        stored = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(stored, tmp_path / "module.safetensors")
        again = modules.empty(module.spec(), device="meta", dtype=dtype)
        again.load_state_dict(load_file(tmp_path / "module.safetensors"), assign=True)
        again.derive()
        assert torch.equal(again(x.to(dtype)), y)


@EACH
@WEIGHTS
def test_the_same_input_gives_the_same_bytes_and_is_left_alone(name: str, kind: str) -> None:
    found, weight = [], weights()[kind]
    for seed in (0, 1):  # of a generator that no method may read
        torch.manual_seed(seed)
        candidate = decomposed(name, weight)
        choice = candidate.fit(weight.numel() // 2)
        units = [units.scores for units in candidate.units]
        found.append([*units, *candidate.tensors().values(), *candidate.cut(choice)["layer"].values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(weight, weights()[kind])


@EACH
def test_a_restored_candidate_is_the_same(name: str) -> None:
    candidate, method = decomposed(name, weights()["wide"]), DECOMPOSERS[name]()
    again = method.restore(
        candidate.target, candidate.units, candidate.tensors, candidate.weights, candidate.statistics
    )
    choice = candidate.fit(90)
    assert again.fit(90) == choice == again.settle(choice)
    for one, other in zip(candidate.cut(choice)["layer"].values(), again.cut(choice)["layer"].values(), strict=True):
        assert torch.equal(one, other)


# --- allocators ---

_MADE: dict[tuple[str, str], Candidate] = {}


def candidates_of(decomposer: str, targets: list[Target], format: str) -> dict[str, Candidate]:
    """Of random weights whose size grows from target to target; each is made once."""
    found = {}
    for i, target in enumerate(sorted(targets, key=lambda t: t.name)):
        (part,), key = target.parts, (decomposer, target.name)
        if key not in _MADE:
            weight = (1 + i) * torch.randn(part.out_features, part.in_features, generator=rng(i))
            _MADE[key] = decomposed(decomposer, weight, target.name)
        candidate = _MADE[key]
        priced = candidate.priced(format, budget.unit_cost(format, part)) if sizes(candidate)["rank"] else candidate
        found[target.name] = priced
    return found


def allocated(name: str, decomposer: str, targets: list[Target], allowed: int, format: str) -> Plan:
    method = ALLOCATORS[name]()
    seen: dict[str, Any] = {"candidates": candidates_of(decomposer, targets, format), "statistics": {0: {}, 1: {}}}
    plan: Plan = method.allocate(Problem(targets, allowed, format, rng(), **seen))
    return plan


@EACH_ALLOCATOR
def test_an_allocator_is_one(name: str) -> None:
    method = ALLOCATORS[name]()
    assert isinstance(method, Allocator) and method.sees == "units" and method.grain >= 1
    assert not method.learns and method.needs == ()


@EACH_ALLOCATOR
@EACH_DECOMPOSER
@FORMATS
def test_the_budget_is_kept_and_used(name: str, decomposer: str, format: str) -> None:
    targets = targets_of_blocks()
    for ratio in (0.05, 0.2, 0.5, 0.999):
        allowed = budget.allowed(targets, ratio)
        plan = allocated(name, decomposer, targets, allowed, format)
        assert plan.budget == allowed and plan.spent == spent(plan, targets) <= allowed
        # an entry costs 1, and there are some left
        assert allowed - plan.spent < 1
        assert Plan.from_json(plan.to_json()) == plan


@EACH_ALLOCATOR
@EACH_DECOMPOSER
@FORMATS
def test_every_choice_is_smaller_than_dense_settled_and_can_be_built(name: str, decomposer: str, format: str) -> None:
    targets = targets_of_blocks()
    plan = allocated(name, decomposer, targets, budget.allowed(targets, 0.3), format)
    candidates = candidates_of(decomposer, targets, format)
    assert plan.choices.keys() <= {target.name for target in targets} and plan.choices
    for target in targets:
        if target.name in plan.choices:
            choice = plan.choices[target.name]
            assert candidates[target.name].settle(choice) == choice
            (part,) = target.parts
            spec = apply.spec_of(choice, target, part)
            cut = candidates[target.name].cut(choice)[part.module]
            module = modules.build(spec, apply.form(spec, cut, torch.float32), None)
            size = sum(parameter.numel() for parameter in module.parameters())
            assert size == budget.count(choice, target) < target.parameters


@EACH_ALLOCATOR
@EACH_DECOMPOSER
@FORMATS
def test_a_larger_budget_never_keeps_less(name: str, decomposer: str, format: str) -> None:
    targets = targets_of_blocks()[:6]
    high = budget.allowed(targets, 0.0)
    budgets = sorted({*range(0, high, high // 4), *range(500, 503), high - 1})
    kept = [allocated(name, decomposer, targets, allowed, format).spent for allowed in budgets]
    assert kept == sorted(kept)


@EACH_ALLOCATOR
@EACH_DECOMPOSER
@FORMATS
def test_the_order_of_targets_does_not_matter(name: str, decomposer: str, format: str) -> None:
    targets = targets_of_blocks()
    allowed = budget.allowed(targets, 0.37)
    plan = allocated(name, decomposer, targets, allowed, format)
    for seed in range(2):
        random.Random(seed).shuffle(targets)
        assert allocated(name, decomposer, targets, allowed, format) == plan


@EACH_ALLOCATOR
@EACH_DECOMPOSER
@FORMATS
def test_ratio_0_leaves_the_model_dense(name: str, decomposer: str, format: str) -> None:
    targets = targets_of_blocks()
    plan = allocated(name, decomposer, targets, budget.allowed(targets, 0.0), format)
    assert not plan.choices and plan.spent == plan.budget == sum(target.parameters for target in targets)


@EACH_ALLOCATOR
def test_matrices_of_rank_alone_are_refused_by_name(name: str) -> None:
    targets = targets_of_blocks()[:1]
    method, (part,) = registry.decomposers()["svd"](), targets[0].parts
    weight = torch.randn(part.out_features, part.in_features, generator=rng())
    candidate = method.decompose(targets[0], {part.module: weight}, {part.module: {}})
    with pytest.raises(ValueError, match=r"b\.0\.q"):
        ALLOCATORS[name]().allocate(Problem(targets, 100, "low_rank", rng(), {targets[0].name: candidate}))
