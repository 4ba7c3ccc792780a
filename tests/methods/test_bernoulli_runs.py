"""Policy gradient runs on tiny models: the plan against its checks, stopped, resumed and failing runs, recipes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spectrim
from spectrim.core import registry
from spectrim.core.plan import Plan, Target
from spectrim.core.pool import Pool
from spectrim.core.registry import Memory, Problem
from spectrim.learn.training import cross_entropy
from spectrim.measure.evaluate import parameters
from spectrim.methods import bernoulli
from spectrim.methods.bernoulli import Bernoulli, Policy, _Training
from spectrim.methods.cap import CapGreedy
from spectrim.model import targets
from tests.learn.toys import WINDOWS, Setting, setting
from tests.methods.test_bernoulli import FORMATS, MODES, SMALL, shared, toy


def plan_of(
    given: Setting, ratio: float = 0.4, seed: int = 0, more: Mapping[str, Any] | None = None, **changes: Any
) -> Plan:
    return Bernoulli(**{**SMALL, **changes}).allocate(given.problem(ratio, seed, **(more or {})))


def loss_of(given: Setting, plan: Plan, ids: Tensor) -> float:
    """Of the model with a plan in it."""
    learned = {n: replace(c, learned=plan.learned.get(n, {})) for n, c in given.candidates.items()}
    live = type(given.live)(given.model, given.live.structure, learned, WINDOWS, 2)
    with live.installed(plan), torch.no_grad():
        return float(cross_entropy(live.answer(ids), ids))


def same(one: Plan, other: Plan) -> bool:
    """Equal in every choice and in which units it keeps."""
    if one.choices != other.choices or one.curves != other.curves or one.learned.keys() != other.learned.keys():
        return False
    return all(torch.equal(t, other.learned[n][k]) for n, made in one.learned.items() for k, t in made.items())


@MODES
@FORMATS
def test_a_plan_is_within_the_budget_and_no_worse_than_the_start(mode: Any, format: str) -> None:
    given = shared(format)
    before, problem = given.state(), given.problem(0.4)
    plan = plan_of(given, mode=mode)
    assert plan.spent == plan.budget == problem.budget
    checks = plan.curves["bernoulli check"]
    assert list(plan.curves["bernoulli check at"]) == [0, 3, 6] and len(plan.curves["bernoulli loss"]) == 6
    greedy = CapGreedy().allocate(problem)
    if format == "low_rank":
        assert loss_of(given, greedy, WINDOWS[-4:]) == pytest.approx(checks[0], rel=1e-4)
    assert loss_of(given, plan, WINDOWS[-4:]) == pytest.approx(min(checks), rel=1e-4)
    at = int(plan.curves["bernoulli check at"][list(checks).index(min(checks))])
    assert f"the plan after {at} of 6 updates is kept, loss {min(checks):.4f} on 4 calibration" in plan.notes[0]
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())


@MODES
def test_a_mask_is_run_as_the_plan_of_it_would_be(mode: Any) -> None:
    """Without refitting, the gates of the units that a plan keeps give its loss."""
    given = toy(refit=0)
    pool = Pool.make(given.candidates, "low_rank", 6 if mode == "grouped" else None)
    policy = Policy(Bernoulli(**{**SMALL, "mode": mode}), pool, given.problem(0.4).budget)
    plan = pool.plan(policy.order(policy.start()), policy.budget)
    kept = []
    for i, name in enumerate(pool.prices):
        for kind, which in enumerate(("order", "entries")):
            mask = torch.zeros(pool.sizes[2 * i + kind])
            mask[plan.learned[name][which] if name in plan.learned else slice(None)] = 1
            kept.append(mask)
    with given.gates() as gates, gates.folded(torch.cat(kept)), torch.no_grad():
        gated = float(cross_entropy(given.live.answer(WINDOWS), WINDOWS))
    assert gated == pytest.approx(loss_of(given, plan, WINDOWS), rel=1e-3)


@MODES
def test_the_same_seed_gives_the_same_and_another_one_another(mode: Any) -> None:
    given = shared()
    quick: dict[str, Any] = {"mode": mode, "passes": 1, "checks": 2}
    one = plan_of(given, **quick)
    shuffled = dataclasses.replace(given, candidates=dict(reversed(given.candidates.items())))
    assert same(plan_of(given, **quick), one) and same(plan_of(shuffled, **quick), one)
    assert plan_of(given, seed=1, **quick).curves["bernoulli loss"] != one.curves["bernoulli loss"]


class Killed(Exception):
    pass


@dataclass
class Dying(Memory):
    """A slot of a process that dies after some saves."""

    after: int = 10**9
    saves: int = 0
    state: Mapping[str, Tensor] | None = field(default=None)

    def save(self, state: Mapping[str, Tensor]) -> None:
        super().save(state)
        self.saves += 1
        if self.saves == self.after:
            raise Killed


@pytest.mark.parametrize(("mode", "after"), [("grouped", 1), ("grouped", 2), ("grouped", 3), ("paper", 2)])
def test_a_killed_training_goes_on_to_the_same_plan(mode: Any, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bernoulli, "EVERY", 2)
    given, slot = shared(), Dying(after=after)
    more = {"slot": lambda name, fields: slot}
    whole = plan_of(given, mode=mode, baseline="moving")
    with pytest.raises(Killed):
        plan_of(given, mode=mode, baseline="moving", more=more)
    assert slot.state is not None
    assert same(plan_of(given, mode=mode, baseline="moving", more=more), whole)
    assert slot.state is None, "what was under way is done"


def test_a_training_is_under_way_until_its_result_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before what it learned is stored has lost nothing: no update is made again."""
    given, slot = shared(), Memory()

    def dying(name: str, fields: Mapping[str, Any], make: Any) -> Mapping[str, Tensor]:
        make()
        raise Killed

    more: dict[str, Any] = {"slot": lambda name, fields: slot}
    whole = plan_of(given)
    with pytest.raises(Killed):
        plan_of(given, more={**more, "remember": dying})
    assert slot.state is not None

    def again(self: _Training, step: int) -> None:
        raise AssertionError(f"update {step} is made again")

    monkeypatch.setattr(_Training, "update", again)
    assert same(plan_of(given, more=more), whole)
    assert slot.state is None


def test_a_training_is_remembered_by_its_budget() -> None:
    given, stored, made = shared(), {}, []

    def remember(name: str, fields: Mapping[str, Any], make: Any) -> Mapping[str, Tensor]:
        key = json.dumps([name, fields])
        if key not in stored:
            made.append(key)
            stored[key] = make()
        return stored[key]

    plans = [plan_of(given, ratio, more={"remember": remember}, passes=1) for ratio in (0.4, 0.4, 0.6)]
    assert same(plans[0], plans[1]) and plans[0].notes == plans[1].notes and len(made) == 2


def losses(monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    """Sampled losses become NaN where bad(their number) says so; those of whole plans do not."""
    original, calls = _Training.loss, itertools.count()

    def loss(self: _Training, ids: Tensor) -> float:
        if any(module._folded is not None for module in self.gates.modules.values()) and bad(next(calls)):
            return math.nan
        return original(self, ids)

    monkeypatch.setattr(_Training, "loss", loss)


def test_masks_without_a_finite_loss_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, lambda i: i in (2, 3, 7))
    plan = plan_of(shared(), masks=3)
    assert "3 masks gave no finite loss" in plan.notes[1]
    assert all(math.isfinite(each) for each in plan.curves["bernoulli loss"])


def test_an_update_without_any_finite_loss_is_named_and_the_model_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    losses(monkeypatch, lambda i: i >= 8)
    given = shared()
    before, modules = given.state(), dict(given.model.named_modules())
    with pytest.raises(ValueError, match=r"no mask of update 4 \(pass 2\)"):
        plan_of(given)
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())
    assert {n: id(m) for n, m in given.model.named_modules()} == {n: id(m) for n, m in modules.items()}


def test_nothing_to_remove_leaves_the_model_dense() -> None:
    assert plan_of(shared(), 0.0).choices == {}


def test_candidates_without_entries_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"q_proj \(role q\) has units of rank only: decompose it by robust_pca"):
        plan_of(setting("llama", match=("0.self_attn.q_proj",)))


def test_ffns_and_models_larger_than_memory_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    given = shared()
    problem = given.problem(0.4)
    Bernoulli().check(problem)
    whole = replace(given.targets[0], role="ffn")
    with pytest.raises(ValueError, match="no single matrix"):
        Bernoulli().check(Problem([whole], 10, "low_rank", torch.Generator()))
    monkeypatch.setattr("os.sysconf", lambda name: 64)
    with pytest.raises(ValueError, match="needs the whole model in memory"):
        Bernoulli().check(problem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, "groups is 0"), ({"passes": 0}, "passes is 0"), ({"rate": 0.0}, "rate is 0.0"),
        ({"masks": 1}, "leave_one_out compares masks"), ({"width": 0.0}, "width is 0.0"),
        ({"checks": 1}, "checks is 1"),
        ({"mode": "both"}, "'grouped' or 'paper'"), ({"scale": "sqrt"}, "'variance', 'deviation' or 'none'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.build("allocator", registry.allocators(), "bernoulli", settings)
    assert Bernoulli(masks=1, baseline="moving").learns


# --- whole runs ---


def targets_of(directory: Path) -> Sequence[Target]:
    return targets.find(AutoModelForCausalLM.from_pretrained(directory)).targets


@pytest.mark.parametrize("name", ["cap", "cap-paper"])
def test_a_recipe_makes_a_model_of_the_planned_size(name: str, llama_dir: Path, tmp_path: Path) -> None:
    allocate = [f"groups.0.allocate.{setting}" for setting in ("passes=1", "batch=4", "trial=2")]
    quick = ["groups.0.decompose.iterations=8", "groups.0.decompose.tolerance=0.5"]
    out = tmp_path / "out"
    result = spectrim.compress(llama_dir, name, ratio=0.5, text=WINDOWS, out=out, settings=[*allocate, *quick])
    removed = parameters(llama_dir)["total"] - parameters(out)["total"]
    dense = sum(target.parameters for target in targets_of(llama_dir))
    assert result.plan.spent == result.plan.budget == dense // 2 == dense - removed
    assert result.plan.notes[-1].startswith("bernoulli: the plan after ")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS).logits
    tried = min(result.plan.curves["bernoulli check"])
    assert float(cross_entropy(logits[-2:], WINDOWS[-2:])) == pytest.approx(tried, rel=1e-3)
