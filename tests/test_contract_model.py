"""The contract of decomposers of FFNs, and of allocators that try plans on a model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core import budget, registry
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.registry import Allocator, Problem
from spectrim.methods.svd import PlainSVD
from spectrim.model import apply, modules, targets
from spectrim.model.live import Installed
from tests.families import FAMILIES, VOCABULARY

DECOMPOSERS = {name: kind for name, kind in registry.decomposers().items() if kind().whole}
OF_ENTRIES = {"bernoulli"}  # tried in tests/methods/test_bernoulli.py
ALLOCATORS = {
    name: kind for name, kind in registry.allocators().items() if kind().sees == "model" and name not in OF_ENTRIES
}
# small enough for a test: every setting that says how much is run
SMALL = {
    "deviation": {"grid": (0.0, 0.5), "sequences": 2},
    "bayesian": {"evaluations": 3, "initial": 1, "sequences": 2},
    "soco": {"steps": 4, "batch": 2},
    "measured_curve": {"trial": 2, "multiple": 1},
    "acip": {"steps": 6, "batch": 2, "post": 1, "snapshots": 0},
}
EACH = pytest.mark.parametrize("name", sorted(DECOMPOSERS))
EACH_ALLOCATOR = pytest.mark.parametrize("name", sorted(ALLOCATORS))
KINDS = pytest.mark.parametrize("kind", ["gated", "plain", "fused"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
HIDDEN, WIDTH = 6, 10


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- decomposers of FFNs ---


def ffn(kind: str) -> tuple[Target, dict[str, Tensor]]:
    rows = {"gated": {"gate": WIDTH, "up": WIDTH}, "plain": {"up": WIDTH}, "fused": {"gate_up": 2 * WIDTH}}[kind]
    parts = [Part(name, out, HIDDEN, "x") for name, out in rows.items()] + [Part("down", HIDDEN, WIDTH, "h")]
    weights = {part.module: torch.randn(part.out_features, part.in_features, generator=rng(3)) for part in parts}
    return Target("mlp", "ffn", (0,), tuple(parts)), weights


def decomposed(name: str, kind: str) -> tuple[Candidate, dict[str, Tensor]]:
    target, weights = ffn(kind)
    method = DECOMPOSERS[name]()
    stats: dict[str, dict[Any, Tensor]] = {part.module: {} for part in target.parts}
    for part in target.parts:
        for statistic in method.needs:
            state = statistic.start(part.in_features, torch.device("cpu"))
            statistic.update(state, torch.randn(40, part.in_features, generator=rng(5)))
            stats[part.module][statistic] = statistic.result(state)
    return method.decompose(target, dict(weights), stats), weights


def at(candidate: Candidate, channels: int) -> Choice:
    return Choice({part.module: "dense" for part in candidate.target.parts}, {"channel": channels})


def output(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    down = weights["down"]
    if "gate_up" in weights:
        gate, up = (x @ weights["gate_up"].T).chunk(2, dim=-1)
        return (torch.relu(gate) * up) @ down.T
    hidden = x @ weights["up"].T
    return (torch.relu(x @ weights["gate"].T) * hidden if "gate" in weights else torch.relu(hidden)) @ down.T


def test_there_is_something_to_test() -> None:
    assert DECOMPOSERS and set(ALLOCATORS) == set(SMALL)


@EACH
@KINDS
def test_all_channels_are_the_ffn_and_fewer_are_it_with_some_silent(name: str, kind: str) -> None:
    candidate, weights = decomposed(name, kind)
    x = torch.randn(7, HIDDEN, generator=rng(9))
    whole = {module: cut["weight"] for module, cut in candidate.cut(at(candidate, WIDTH)).items()}
    assert all(torch.equal(whole[module], weight) for module, weight in weights.items())
    for channels in range(1, WIDTH):
        cut = {module: tensors["weight"] for module, tensors in candidate.cut(at(candidate, channels)).items()}
        stays = (cut["down"].T[:, None] == weights["down"].T[None]).all(-1).any(0)
        assert stays.sum() == channels
        silent = {**weights, "down": weights["down"] * stays}
        torch.testing.assert_close(output(cut, x), output(silent, x))


@EACH
@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_predicted_cost_is_what_is_built(name: str, kind: str, bias: bool) -> None:
    candidate, _ = decomposed(name, kind)
    units = candidate.units[0]
    assert units.kind == "channel" and len(units.scores) == WIDTH and (units.scores.diff() <= 0).all()
    for channels in range(1, WIDTH):
        cost = candidate.fixed_cost + int(units.costs[:channels].sum())
        choice = candidate.first(cost)
        assert choice.counts == {"channel": channels} and budget.count(choice, candidate.target) == cost
        cut, size = candidate.cut(choice), 0
        for part in candidate.target.parts:
            spec = apply.spec_of(choice, candidate.target, part) | {"bias": bias}
            given = apply.bias_of(cut[part.module], torch.arange(part.out_features) * 1.0) if bias else None
            module = modules.build(spec, apply.form(spec, cut[part.module], torch.float32), given)
            size += sum(p.numel() for n, p in module.named_parameters() if n != "bias")
        assert size == cost


@EACH
@KINDS
def test_a_candidate_of_an_ffn_comes_back_from_what_is_stored(name: str, kind: str) -> None:
    candidate, weights = decomposed(name, kind)
    again = DECOMPOSERS[name]().restore(candidate.target, candidate.units, candidate.tensors, lambda: weights, dict)
    for channels in (1, 4, WIDTH):
        one, other = (each.cut(at(each, channels)) for each in (candidate, again))
        assert all(torch.equal(one[m][t], other[m][t]) for m in one for t in one[m])


# --- allocators that try plans ---

CALIBRATION = torch.randint(1, VOCABULARY, (4, 16), generator=rng(2))


class Trial:
    """A tiny model with every target decomposed, and problems on it."""

    def __init__(self, format: str) -> None:
        self.model, self.format = FAMILIES["qwen3"].make(), format
        structure = targets.find(self.model)
        self.targets = list(structure.targets)
        self.candidates = {}
        for target in self.targets:
            (part,) = target.parts
            weight = self.model.get_submodule(part.module).weight.detach()
            candidate = PlainSVD().decompose(target, {part.module: weight}, {part.module: {}})
            self.candidates[target.name] = candidate.priced(format, budget.unit_cost(format, part))
        self.live = Installed(self.model, structure, self.candidates, CALIBRATION, 2)

    def plan(self, name: str, allowed: int, shuffled: int | None = None) -> Plan:
        targets = list(self.targets)
        if shuffled is not None:
            random.Random(shuffled).shuffle(targets)
        method = ALLOCATORS[name](**SMALL[name])
        problem = Problem(targets, allowed, self.format, rng(), self.candidates, {}, self.live)
        return method.allocate(problem)


@EACH_ALLOCATOR
@FORMATS
def test_the_budget_is_kept_and_used_and_the_model_left_as_it_was(name: str, format: str) -> None:
    trial = Trial(format)
    modules_before = dict(trial.model.named_modules())
    before = {key: value.clone() for key, value in trial.model.state_dict().items()}
    assert isinstance(ALLOCATORS[name](), Allocator)
    for ratio in (0.1, 0.4):
        allowed = budget.allowed(trial.targets, ratio)
        plan = trial.plan(name, allowed)
        kept = [
            budget.count(plan.choices[t.name], t) if t.name in plan.choices else t.parameters for t in trial.targets
        ]
        assert plan.spent == sum(kept) <= allowed == plan.budget
        largest = max(int(torch.as_tensor(budget.unit_cost(format, t.parts[0])).max()) for t in trial.targets)
        assert allowed - plan.spent < ALLOCATORS[name](**SMALL[name]).grain * largest
        assert all(
            budget.count(choice, t) < t.parameters or "dense" in choice.formats.values()  # rewritten
            for t in trial.targets
            if (choice := plan.choices.get(t.name))
        )
        assert Plan.from_json(plan.to_json()) == replace(plan, learned={})
    assert {n: id(m) for n, m in trial.model.named_modules()} == {n: id(m) for n, m in modules_before.items()}
    assert all(torch.equal(value, before[key]) for key, value in trial.model.state_dict().items())


@EACH_ALLOCATOR
def test_the_order_of_targets_does_not_matter_and_the_same_seed_gives_the_same(name: str) -> None:
    trial = Trial("low_rank")
    allowed = budget.allowed(trial.targets, 0.3)
    plan = trial.plan(name, allowed)
    for other in (trial.plan(name, allowed), trial.plan(name, allowed, shuffled=1)):
        assert other.to_json() == plan.to_json() and other.learned.keys() == plan.learned.keys()
        for target, made in plan.learned.items():
            assert made.keys() == other.learned[target].keys()
            assert all(torch.equal(tensor, other.learned[target][key]) for key, tensor in made.items())


@EACH_ALLOCATOR
@FORMATS
def test_ratio_0_leaves_the_model_dense_and_too_much_is_refused(name: str, format: str) -> None:
    trial = Trial(format)
    assert not trial.plan(name, budget.allowed(trial.targets, 0.0)).choices
    with pytest.raises(ValueError, match="ratio"):
        trial.plan(name, budget.allowed(trial.targets, 0.97))
