"""The policy gradient: its estimator against every mask there is, its plans against the greedy start."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.bytes import stored_bytes
from spectrim.core.pool import Pool
from spectrim.methods.bernoulli import Bernoulli, Policy, _Training, direction, left_out
from spectrim.methods.cap import CapGreedy, RobustPCA
from tests.learn.toys import Setting, setting
from tests.methods.test_cap import mixed

SCALES = pytest.mark.parametrize("scale", ["variance", "deviation", "none"])
MODES = pytest.mark.parametrize("mode", ["grouped", "paper"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
PROJECTIONS = pytest.mark.parametrize("projection", ["replicated", "euclidean"])
SMALL: dict[str, Any] = {"groups": 6, "width": 0.25, "passes": 2, "batch": 2, "checks": 3, "trial": 4}


def toy(
    format: str = "low_rank",
    match: tuple[str, ...] = ("0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.down_proj"),
    refit: int = 2,
) -> Setting:
    """A tiny model whose matrices have a falling spectrum and some large entries, decomposed by robust PCA."""
    made = setting("llama", format, match=match)
    for i, (name, old) in enumerate(made.candidates.items()):
        (part,) = old.target.parts
        weight = made.model.get_submodule(part.module).weight
        weight.data = (0.02 * (1 + i) * mixed(part.out_features, part.in_features)).to(weight.dtype)
        found = RobustPCA(refit=refit).decompose(old.target, {part.module: weight.detach().clone()}, {part.module: {}})
        made.candidates[name] = replace(found, weights=old.weights).priced(format, budget.unit_cost(format, part))
    return made


_TOYS: dict[str, Setting] = {}


def shared(format: str = "low_rank") -> Setting:
    """One toy a format, for tests that leave it as it was."""
    return _TOYS.setdefault(format, toy(format))


# --- the estimator ---

S = torch.tensor([0.5, 0.1, 0.93, 0.3, 0.7], dtype=torch.float64)
WORTH = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def all_masks() -> list[tuple[Tensor, float]]:
    """Every mask, and how likely it is."""
    found = []
    for kept in itertools.product((0.0, 1.0), repeat=len(S)):
        mask = torch.tensor(kept, dtype=torch.float64)
        found.append((mask, float((mask * S + (1 - mask) * (1 - S)).prod())))
    return found


def toy_loss(mask: Tensor) -> float:
    """Separable but for a product of two."""
    return float(WORTH @ mask) + 2.0 * float(mask[0] * mask[3]) + 7.0


# d E[loss] / d s
GRADIENT = WORTH + 2.0 * torch.tensor([S[3], 0.0, 0.0, S[0], 0.0], dtype=torch.float64)


def weighted(scale: str) -> Tensor:
    """What the estimator is an unbiased one of."""
    return GRADIENT * {"variance": 1.0, "deviation": (S * (1 - S)).sqrt(), "none": S * (1 - S)}[scale]


@SCALES
def test_the_estimator_is_0_on_average_where_the_loss_is_constant(scale: Any) -> None:
    total = sum(p * direction([mask], torch.ones(1, dtype=torch.float64), S, scale) for mask, p in all_masks())
    torch.testing.assert_close(total, torch.zeros_like(S), rtol=0, atol=1e-12)


@SCALES
def test_one_mask_and_a_constant_baseline_give_the_gradient(scale: Any) -> None:
    total = sum(
        p * direction([mask], torch.tensor([toy_loss(mask) - 3.3], dtype=torch.float64), S, scale)
        for mask, p in all_masks()
    )
    torch.testing.assert_close(total, weighted(scale))


@SCALES
def test_leaving_one_out_gives_the_gradient(scale: Any) -> None:
    total = torch.zeros_like(S)
    for (one, p), (other, q) in itertools.product(all_masks(), repeat=2):
        losses = torch.tensor([toy_loss(one), toy_loss(other)], dtype=torch.float64)
        total += p * q * direction([one, other], left_out(losses), S, scale)
    torch.testing.assert_close(total, weighted(scale))


def test_what_is_left_out_is_above_the_mean_of_the_others() -> None:
    losses = torch.tensor([1.0, 4.0, 7.0, 2.0], dtype=torch.float64)
    others = torch.stack([(losses.sum() - each) / 3 for each in losses])
    torch.testing.assert_close(left_out(losses), losses - others)
    # the form with 1 / (K − 1) and the mean of all
    masks = [(torch.rand(5, generator=torch.Generator().manual_seed(i)) < S).double() for i in range(4)]
    total = sum((losses[i] - losses.mean()) * (mask - S) for i, mask in enumerate(masks)) / 3
    torch.testing.assert_close(direction(masks, left_out(losses), S, "none"), total)


def test_probabilities_near_0_and_1_are_clamped_in_the_estimator_only() -> None:
    s = torch.tensor([0.0, 1e-5, 1.0], dtype=torch.float64)
    found = direction([torch.tensor([True, True, False])], torch.ones(1, dtype=torch.float64), s, "variance")
    torch.testing.assert_close(found, torch.tensor([1.0, 1 - 1e-5, -1.0], dtype=torch.float64) / (1e-3 * 0.999))


def training(**changes: Any) -> _Training:
    given = shared()
    settings, problem = Bernoulli(**{**SMALL, **changes}), given.problem(0.4)
    pool = Pool.make(given.candidates, "low_rank", settings.groups if settings.mode == "grouped" else None)
    return _Training(Policy(settings, pool, problem.budget), problem)


def test_the_moving_baseline_is_as_published() -> None:
    trained, delta = training(baseline="moving", normalised=False, window=5), math.nan
    for loss in (3.0, 2.0, 2.5, 1.0):
        delta = loss if math.isnan(delta) else 0.8 * delta + 0.2 * loss
        found = trained.advantages(torch.tensor([loss - 0.1, loss + 0.1], dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor([loss - 0.1, loss + 0.1], dtype=torch.float64) - delta)


def test_advantages_are_divided_by_their_running_deviation() -> None:
    raw, divided = training(normalised=False), training()
    for i in range(4):
        losses = torch.tensor([1.0, 2.0 + i], dtype=torch.float64)
        found = raw.advantages(losses)
        torch.testing.assert_close(divided.advantages(losses), found / raw.state["spread"].sqrt())
    alone = divided.advantages(torch.tensor([4.0], dtype=torch.float64))
    assert alone.tolist() == [0.0], "one loss alone has nothing to be compared with"


# --- the policy ---


@MODES
@FORMATS
def test_probabilities_spend_the_budget_and_start_at_the_greedy_plan(mode: Any, format: str) -> None:
    given = shared(format)
    for ratio in (0.1, 0.5, 0.9):
        problem = given.problem(ratio)
        pool = Pool.make(given.candidates, format, 6 if mode == "grouped" else None)
        policy = Policy(Bernoulli(**{**SMALL, "mode": mode}), pool, problem.budget)
        logits = policy.start()
        s = policy.probabilities(logits)
        assert float(s.min()) >= 0 and float(s.max()) <= 1
        assert policy.cost(s) <= problem.budget * (1 + 1e-6)
        spends = policy.cost(s) >= problem.budget * (1 - 1e-4)
        assert spends or (mode == "paper" and torch.equal(s, pool.places)), "nothing is raised in paper mode"
        torch.testing.assert_close(policy.probabilities(logits), s)
        greedy = CapGreedy().allocate(problem)
        plan = pool.plan(policy.order(logits), problem.budget)
        if format == "low_rank":
            assert plan.choices == greedy.choices
        assert plan.spent == greedy.spent == problem.budget


def policy_of(mode: Any, format: str, **changes: Any) -> Policy:
    """At half the budget."""
    given = shared(format)
    pool = Pool.make(given.candidates, format, 6 if mode == "grouped" else None)
    return Policy(Bernoulli(**{**SMALL, "mode": mode, **changes}), pool, given.problem(0.5).budget)


@PROJECTIONS
def test_learning_finds_out_what_is_worth_more(projection: Any) -> None:
    """A loss that is the sum of what is left out, with weights that the greedy order does not know."""
    policy = policy_of("grouped", "low_rank", projection=projection, rate=0.4)
    pool, logits, draw = policy.pool, policy.start(), torch.Generator().manual_seed(0)
    worth = torch.tensor([3.0, 1.0] * (len(pool.sizes) // 2))[pool.segment] * pool.costs  # of directions more
    before = float(worth @ policy.probabilities(logits))
    for _ in range(15):
        s = policy.probabilities(logits)
        masks = [torch.rand(len(s), generator=draw) < s for _ in range(2)]
        losses = torch.tensor([-float(worth @ mask.float()) for mask in masks], dtype=torch.float64)
        advantages = left_out(losses) / left_out(losses).abs().max().clamp_min(1e-9)
        logits = policy.moved(logits, s, direction(masks, advantages, s, "none"))
        assert policy.cost(policy.probabilities(logits)) <= policy.budget * (1 + 1e-6)
    assert float(worth @ policy.probabilities(logits)) > 1.05 * before


@MODES
@PROJECTIONS
@FORMATS
def test_a_step_down_the_gradient_lowers_the_loss_within_the_budget(mode: Any, projection: Any, format: str) -> None:
    policy = policy_of(mode, format, projection=projection, rate=0.02)
    pool, logits = policy.pool, policy.start()
    s = policy.probabilities(logits)
    noise = torch.rand(len(pool.sizes), generator=torch.Generator().manual_seed(3))
    worth = (0.2 + noise)[pool.segment] * pool.costs
    stepped = policy.probabilities(policy.moved(logits, s, -worth / worth.mean() * s * (1 - s)))
    assert policy.cost(stepped) <= policy.budget * (1 + 1e-6)
    assert float(worth @ stepped) > float(worth @ s) * (1 + 1e-5)


def test_an_equal_worth_of_all_parameters_moves_no_logit() -> None:
    """The euclidean shift takes out just what the budget asks: the expected step is none."""
    for scale in ("variance", "none"):
        policy = policy_of("grouped", "low_rank", scale=scale, rate=1e-3)
        pool, logits = policy.pool, policy.start()
        s = policy.probabilities(logits)
        inside = ((s > 0) & (s < 1)).float()
        expected = -inside * pool.costs / pool.costs.mean() * (s * (1 - s) if scale == "none" else 1)
        moved = policy.moved(logits, s, expected) - logits
        uneven = expected * (1 + (pool.segment == int(pool.segment[inside.bool()][0])))
        assert moved.abs().max() < 0.02 * (policy.moved(logits, s, uneven) - logits).abs().max()


# --- a budget of bytes ---


@FORMATS
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_pool_spends_bytes_in_any_order(format: str, itemsize: int) -> None:
    given = shared(format)
    targets = given.targets
    pool = Pool.make(given.candidates, format, 6)
    random = torch.rand(len(pool.keys), generator=torch.Generator().manual_seed(1))
    for ratio in (0.05, 0.4, 0.8):
        allowed = given.problem(ratio).budget
        for order in (pool.unit_places(), random):
            plan = replace(pool, itemsize=itemsize).plan(order, allowed)
            stored = stored_bytes(targets, plan.choices, itemsize)
            assert plan.budget == allowed and allowed * itemsize - (itemsize + 2) < stored <= allowed * itemsize
            for target in targets:
                if target.name in plan.choices:
                    own = stored_bytes([target], {target.name: plan.choices[target.name]}, itemsize)
                    assert own < itemsize * target.parameters
                    counts = plan.choices[target.name].counts
                    assert [len(plan.learned[target.name][k]) for k in ("order", "entries")] == list(counts.values())
        greedy = CapGreedy(budget="bytes").allocate(replace(given.problem(ratio), itemsize=itemsize))
        if format == "low_rank":
            start = replace(pool, itemsize=itemsize).plan(pool.unit_places(), allowed)
            assert start.choices == greedy.choices
    whole = replace(pool, itemsize=itemsize).plan(random, given.problem(0.0).budget)
    assert whole.choices == {} and whole.spent == given.problem(0.0).budget


@MODES
def test_the_plan_of_a_training_is_within_the_bytes(mode: Any) -> None:
    given = shared("low_rank")
    problem = replace(given.problem(0.4), itemsize=2)
    quick: dict[str, Any] = {**SMALL, "mode": mode, "passes": 1, "checks": 2}
    plan = Bernoulli(**quick, budget="bytes").allocate(problem)
    stored, allowed = stored_bytes(given.targets, plan.choices, 2), 2 * problem.budget
    assert plan.spent < plan.budget == problem.budget and allowed - 4 < stored <= allowed
    assert plan.notes[1] == f"bernoulli: {stored:,} of {allowed:,} bytes allowed, indices included (2 a number)"
    nominal = Bernoulli(**quick).allocate(problem)
    assert nominal.spent == problem.budget and len(nominal.notes) == 1
    assert nominal.choices == Bernoulli(**quick, budget="parameters").allocate(given.problem(0.4)).choices
