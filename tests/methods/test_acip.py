"""ACIP on tiny models: the gate and the score map against their definitions, and the plans of a training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core import budget
from spectrim.core.plan import Candidate, Plan, Target
from spectrim.core.registry import Problem
from spectrim.learn.gates import GatedLinear
from spectrim.methods import acip
from spectrim.methods.acip import ACIP, _Training, aged, places, switched
from spectrim.methods.svd import PlainSVD
from spectrim.model import targets
from spectrim.model.live import Installed
from spectrim.model.targets import Structure
from tests.families import FAMILIES, VOCABULARY

BOTH = pytest.mark.parametrize("format", ["low_rank", "pivot"])
TEXT = torch.randint(1, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(2))
# masks fall from 0.02 by about 0.004 a step: the first die at step 5
SMALL = ACIP(
    steps=14, post=4, batch=2, rate=4e-3, adapter_rate=5e-3, penalty=0.05, growth=1.3, every=1, adapter=2, share=0.125
)


@dataclass
class Memory:
    """A work directory in memory, which counts what is made."""

    stored: dict[str, Mapping[str, Tensor]]
    made: int = 0

    def __call__(self, name: str, fields: Mapping[str, Any], make: Any) -> Mapping[str, Tensor]:
        key = f"{name} {sorted(fields.items())}"
        if key not in self.stored:
            self.stored[key] = make()
            self.made += 1
        return self.stored[key]


@dataclass
class Setting:
    """A tiny model, its targets and their candidates."""

    model: Any
    structure: Structure
    candidates: dict[str, Candidate]
    format: str

    @property
    def targets(self) -> list[Target]:
        return list(self.structure.targets)

    def live(self, plan: Plan | None = None) -> Installed:
        learned = plan.learned if plan else {}
        made = {name: replace(c, learned=learned.get(name, {})) for name, c in self.candidates.items()}
        return Installed(self.model, self.structure, made, TEXT, 2)

    def problem(self, ratio: float, **more: Any) -> Problem:
        allowed, seed = budget.allowed(self.targets, ratio), torch.Generator().manual_seed(0)
        given: dict[str, Any] = {"candidates": self.candidates, "live": self.live(), **more}
        return Problem(self.targets, allowed, self.format, seed, **given)

    def logits(self, plan: Plan) -> Tensor:
        live = self.live(plan)
        with live.installed(plan), torch.no_grad():
            return live.answer(TEXT)


def setting(format: str = "low_rank", family: str = "qwen3") -> Setting:
    model: Any = FAMILIES[family].make()
    structure, candidates = targets.find(model), {}
    for target in structure.targets:
        (part,) = target.parts
        weight = targets.oriented(model.get_submodule(part.module), model.get_submodule(part.module).weight.detach())
        made = PlainSVD().decompose(target, {part.module: weight}, {part.module: {}})
        candidates[target.name] = made.priced(format, budget.unit_cost(format, part))
    return Setting(model, structure, candidates, format)


def kept(plan: Plan, on: Setting) -> dict[str, set[int]]:
    """The directions of each matrix, all of them where it is dense."""
    found = {}
    for target in on.targets:
        choice = plan.choices.get(target.name)
        if choice is None or choice.formats[target.name] == "dense":
            found[target.name] = set(range(len(on.candidates[target.name].rank_units.scores)))
        else:
            number = choice.counts["rank"] - SMALL.rank(target.parts[0])
            found[target.name] = set(plan.learned[target.name]["order"][:number].tolist())
    return found


# --- the gate ---


def answer(training: _Training, ids: Tensor = TEXT) -> Tensor:
    """The logits of the model as it is trained."""
    with torch.no_grad():
        training.loss(torch.arange(1))  # puts gates and adapters in
        return training.live.answer(ids)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_the_model_begins_as_the_dense_one(family: str) -> None:
    on = setting(family=family)
    dense = on.model(TEXT).logits
    training = _Training(SMALL, on.problem(0.3))
    with training.gates:
        torch.testing.assert_close(answer(training), dense, atol=1e-4, rtol=1e-5)
        assert all(isinstance(m, GatedLinear) and m.further is not None for m in training.gates.modules.values())
    assert training.size(training.alive()) == 1.0
    assert torch.equal(on.model(TEXT).logits, dense), "afterwards it is as before"


def test_what_is_alive_acts_whole_whatever_its_mask() -> None:
    training = _Training(SMALL, setting().problem(0.3))
    with training.gates, torch.no_grad():
        signs = torch.rand(len(training.mask), generator=torch.Generator().manual_seed(1)) - 0.3
        found = []
        for size in (1e-6, 0.02, 30.0):
            training.mask.copy_(signs * size)
            found.append(answer(training))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        training.mask.copy_(signs.abs())
        assert not torch.allclose(answer(training), found[0], atol=1e-3)


def test_the_gradient_is_that_of_a_factor_on_the_direction_and_0_for_the_dead() -> None:
    training = _Training(SMALL, setting().problem(0.3))
    with training.gates:
        with torch.no_grad():
            training.mask[::3] = -0.01
            training.a.normal_(generator=torch.Generator().manual_seed(1))
        training.update(0)
        assert training.mask.grad is not None and training.a.grad is not None and training.b.grad is not None
        penalty = SMALL.penalty * (training.mask > 0)
        factor = (training.mask > 0).float().requires_grad_()
        training.loss(torch.arange(1))
        training.gates.set(factor)
        chosen = training.order.at(0)
        acip.cross_entropy(training.live.answer(TEXT[chosen]), TEXT[chosen]).backward()
        assert factor.grad is not None and (factor.grad != 0).all(), "the dead would have one"
        expected = factor.grad * (training.mask > 0) / SMALL.constant + penalty
        torch.testing.assert_close(training.mask.grad, expected, rtol=1e-4, atol=1e-5)
        assert (training.mask.grad[::3] == 0).all() and (training.mask.grad[1::3] != 0).all()
        assert (training.a.grad != 0).any() and (training.b.grad != 0).any()


def test_the_switch() -> None:
    mask = torch.tensor([-1.0, 0.0, 1e-9, 0.02, 5.0], requires_grad=True)
    gate = switched(mask, 0.02)
    assert gate.tolist() == [0, 0, 1, 1, 1]
    gate.sum().backward()
    assert mask.grad is not None and mask.grad.tolist() == pytest.approx([0, 0, 50, 50, 50])


# --- scores ---


def test_scores_age() -> None:
    scores = torch.full((4,), 0.02, dtype=torch.float64)
    steps = [[0.02, 0.01, -0.1, 0.03], [0.03, -0.01, -0.2, 0.02], [0.01, -0.01, -0.2, 0.0], [0.02, -0.1, 0.5, 0.0]]
    found = []
    for step in steps:
        scores = aged(scores, torch.tensor(step))
        found.append([round(score, 6) for score in scores.tolist()])
    assert found == [
        [0.02, 0.01, -1, 0.03],
        [0.03, -1, -2, 0.02],
        [0.01, -2, -3, -1],
        [0.02, -3, 0.5, -2],  # what comes back counts as never gone
    ]
    long = torch.tensor([-1e6], dtype=torch.float64)
    assert float(aged(long, torch.tensor([-1.0]))) == -1e6 - 1, "and is not rounded"


def test_equal_scores_go_by_the_last_mask_then_by_sigma_then_in_order() -> None:
    scores = torch.tensor([-3.0, -1.0, -1.0, 0.01, -1.0, -1.0], dtype=torch.float64)
    last = torch.tensor([0.9, 0.1, 0.2, 0.01, 0.1, 0.1], dtype=torch.float64)
    sigma = torch.tensor([9.0, 1.0, 1.0, 0.5, 2.0, 1.0])
    assert places(scores, last, sigma).tolist() == [1, 3, 5, 6, 4, 2]


def trained(on: Setting, method: ACIP = SMALL, ratio: float = 0.3) -> tuple[Plan, Mapping[str, Tensor]]:
    memory = Memory({})
    plan = method.allocate(on.problem(ratio, remember=memory))
    (made,) = memory.stored.values()
    return plan, made


def test_later_deaths_rank_higher_and_the_living_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: dict[int, int] = {}
    original = _Training.after

    def watched(self: _Training, step: int) -> bool:
        if not self.state["frozen"]:
            for index in (self.mask <= 0).nonzero()[:, 0].tolist():
                deaths.setdefault(index, step)
        return original(self, step)

    monkeypatch.setattr(_Training, "after", watched)
    _, made = trained(setting())
    scores, steps = made["scores"].tolist(), set(deaths.values())
    assert len(steps) > 4 and 50 < len(deaths) < len(scores)
    last = int(made["frozen"]) - 1
    assert all(scores[index] == step - last - 1 for index, step in deaths.items())
    assert all(score > 0 for index, score in enumerate(scores) if index not in deaths)


def test_what_has_no_effect_dies_first() -> None:
    on = setting()
    useless = {f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")}
    with torch.no_grad():
        on.model.get_submodule("model.layers.0.mlp.down_proj").weight.zero_()
    gates = _Training(SMALL, on.problem(0.3)).gates
    plan, made = trained(on, replace(SMALL, adapter=0, highest=0.9))
    split = gates.slices.split(made["scores"])
    first = max(float(split[name].max()) for name in useless)
    assert first < 0, "nothing is learned for them: they fall at full speed"
    others = torch.cat([scores for name, scores in split.items() if name not in useless])
    assert (others >= first).double().mean() > 0.9
    assert all(plan.choices[name].counts["rank"] == 1 for name in useless)


# --- plans ---


@BOTH
def test_the_budget_is_kept_to_a_direction_and_counts_the_adapters(format: str) -> None:
    on, memory = setting(format), Memory({})
    for ratio in (0.1, 0.3, 0.5, 0.1):
        asked = on.problem(ratio, remember=memory)
        plan = SMALL.allocate(asked)
        by_target = {t: plan.choices.get(t.name) for t in on.targets}
        assert plan.spent == sum(budget.count(c, t) if c else t.parameters for t, c in by_target.items())
        largest = max(sum((p.out_features, p.in_features)) for t in on.targets for p in t.parts)
        assert 0 <= asked.budget - plan.spent < largest
        for target, choice in by_target.items():
            assert choice is None or choice.formats[target.name] == "dense" or choice.counts["rank"] >= 3
    assert memory.made == 1


def test_a_plan_comes_back_and_larger_ones_have_all_of_smaller_ones() -> None:
    on, memory = setting(), Memory({})
    ratios = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    plans = [SMALL.allocate(on.problem(ratio, remember=memory)) for ratio in ratios]
    again = SMALL.allocate(on.problem(0.6, remember=memory))
    assert again.dumps() == plans[0].dumps() and memory.made == 1
    assert all(torch.equal(again.learned[t][n], x) for t, made in plans[0].learned.items() for n, x in made.items())
    assert not plans[-1].choices and not plans[-1].learned, "ratio 0 is the model itself"
    # the step to dense, and what is left of the budget, are spent on what fits: a direction or two a plan
    for less, more in itertools.pairwise(kept(plan, on) for plan in plans):
        lost = {name: less[name] - more[name] for name in less if less[name] < set(range(len(less[name])))}
        assert sum(len(each) for name, each in lost.items() if len(less[name]) < 10) <= 2
        assert sum(map(len, less.values())) < sum(map(len, more.values()))


@pytest.mark.parametrize(("format", "ratio"), [("low_rank", 0.3), ("pivot", 0.02)])
def test_what_is_built_is_what_was_trained(format: str, ratio: float) -> None:
    on, method = setting(format), replace(SMALL, snapshots=0)
    plan, made = trained(on, method, ratio)
    assert {c.formats[name] for name, c in plan.choices.items()} == {format, "dense"}
    training = _Training(method, on.problem(ratio))
    directions = kept(plan, on)
    with training.gates, torch.no_grad():
        training.a.copy_(made["a"])
        training.b.copy_(made["b"])
        training.mask.fill_(-1)
        for name, place in training.gates.slices.of.items():
            training.mask[place][list(directions[name])] = 1
        expected = answer(training)
    torch.testing.assert_close(on.logits(plan), expected, atol=2e-4, rtol=1e-4)
    # without its adapter a matrix that ends dense is the one before
    bare = replace(method, merge=False).allocate(on.problem(ratio, remember=lambda *_: made))
    assert bare.choices.keys() == bare.learned.keys() < plan.choices.keys() and bare.spent == plan.spent
    assert all(choice.formats[name] == format for name, choice in bare.choices.items())


def test_a_ratio_has_the_adapters_of_the_size_that_it_is_nearest_to() -> None:
    on, method = setting("pivot"), replace(SMALL, snapshots=2, highest=0.3, post=3)
    memory = Memory({})
    plans = {ratio: method.allocate(on.problem(ratio, remember=memory)) for ratio in (0.05, 0.1, 0.15, 0.2, 0.25, 0.35)}
    (made,) = memory.stored.values()
    sizes, adapters = made["history"][:, 1], acip._Adapters.make(method, on.targets)
    for place, ratio in enumerate((0.1, 0.2)):
        step = int(made["passed"][place])
        assert 1 - float(sizes[step]) >= ratio > 1 - float(sizes[step - 1])
        _, stopped = trained(on, replace(method, steps=step, post=0))
        assert torch.equal(stopped["a"], made["passed a"][place]) and torch.equal(stopped["b"], made["passed b"][place])
    expected = {0.05: 0, 0.1: 0, 0.15: 1, 0.2: 1, 0.25: None, 0.35: None}
    for ratio, plan in plans.items():
        at = expected[ratio]
        a, b = (made["a"], made["b"]) if at is None else (made["passed a"][at], made["passed b"][at])
        for target in on.targets:
            own = adapters.of(target.name, a, b)
            assert own is not None and own[0].shape == (target.parts[0].out_features, 2)
            assert torch.equal(plan.learned[target.name]["left"], method.scale * own[0])
            assert torch.equal(plan.learned[target.name]["right"], own[1])


def test_no_adapters() -> None:
    on = setting()
    plan, made = trained(on, replace(SMALL, adapter=0))
    assert len(made["a"]) == len(made["b"]) == 0 and len(made["history"]) == int(made["frozen"]) <= SMALL.steps
    assert all(set(learned) == {"order"} for learned in plan.learned.values())


def test_training_lowers_the_loss_after_the_masks_are_frozen_and_reports_it() -> None:
    method = replace(SMALL, post=20, adapter_rate=2e-2)
    plan, made = trained(setting(), method)
    frozen = int(made["frozen"])
    assert len(made["history"]) == frozen + 20 and set(plan.curves) == {f"acip {name}" for name in acip.COLUMNS}
    loss, size, penalty, alive = made["history"].T
    assert float(loss[-6:].mean()) < float(loss[frozen : frozen + 6].mean())
    assert (size.diff() <= 0).all() and (alive.diff() <= 0).all() and float(size[0]) == 1
    assert (penalty[:frozen] > 0).all() and (penalty[frozen:] == 0).all()
    assert len(set(size[frozen:].tolist())) == 1


def test_masks_are_frozen_at_the_ratio_and_what_lies_beyond_is_said(caplog: pytest.LogCaptureFixture) -> None:
    on = setting()
    plan, made = trained(on, replace(SMALL, highest=0.1))
    assert int(made["frozen"]) < SMALL.steps and float(made["size"]) <= 0.9
    (note,) = plan.notes
    assert "0.300" in note and "beyond" in note and note in caplog.text
    short, made = trained(on, replace(SMALL, steps=3, post=2))
    assert int(made["frozen"]) == 3 and float(made["size"]) == 1 and len(made["history"]) == 5
    assert len(short.notes) == 2 and "0.000 in 3 steps, not 0.6" in short.notes[0]


def test_singular_values_rank_without_training() -> None:
    on = setting()
    method = ACIP(order="singular")
    assert (method.sees, method.learns, SMALL.sees, SMALL.learns) == ("units", False, "model", True)
    plan = method.allocate(on.problem(0.3, live=None))
    spectra = {name: on.candidates[name].rank_units.scores for name in plan.choices}
    counts = {name: choice.counts["rank"] for name, choice in plan.choices.items()}
    assert (
        set(counts.values()) != {1}
        and len(counts) > 3
        and all(set(made) == {"order"} for made in plan.learned.values())
    )
    taken = torch.cat([spectra[name][:count] for name, count in counts.items()])
    smallest = torch.cat(list(spectra.values())).sort(descending=True).values[len(taken) - 1]
    assert len(taken) > 80 and (taken < smallest).sum() <= 3, "what still fitted at the end"
