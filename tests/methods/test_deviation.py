"""Allocation by measured deviation, over a toy model: the table against full passes, the plan against all plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.core import budget, registry
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target, Units
from spectrim.core.registry import Live, Problem
from spectrim.methods.deviation import Deviation, Row, base_of, kept
from spectrim.methods.svd import PlainSVD
from tests.methods.stopping import Remembered, StopAtFour

HIDDEN, INNER, WORDS = 12, 20, 17
KINDS = pytest.mark.parametrize("kind", ["kl", "hidden", "perplexity"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + 0.5 * before + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        for block in self.blocks:
            nn.init.normal_(block.down.weight, std=0.5)


class Pair(nn.Module):
    """The product of two factors."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = left @ right, bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass
class ToyLive:
    """A toy model as allocators see one, which counts what is run."""

    model: Toy
    candidates: Mapping[str, Candidate]
    passes: int = 0
    asked: int = 0
    broken: tuple[str, int] | None = None  # a target whose choice of that many units gives NaN

    @property
    def blocks(self) -> int:
        return len(self.model.blocks)

    def batches(self, sequences: int | None = None, length: int | None = None) -> list[Tensor]:
        self.asked += 1
        ids = torch.randint(WORDS, (6, 9), generator=torch.Generator().manual_seed(1))
        return list(ids[:sequences, :length].split(4))

    def enter(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids).detach()

    def run(self, ids: Tensor, state: Tensor, start: int, stop: int) -> Tensor:
        for block in self.model.blocks[start:stop]:
            self.passes += 1
            state = block(state)
        return state.detach()

    def logits(self, ids: Tensor, state: Tensor) -> Tensor:
        return self.model.head(state).detach()

    def installed(self, plan: Plan) -> Any:
        return self.swapped({m: b for name, c in plan.choices.items() for m, b in self.built(name, c).items()})

    def built(self, target: str, choice: Choice) -> dict[str, nn.Module]:
        self.asked += 1
        made: dict[str, nn.Module] = {}
        for name, cut in self.candidates[target].cut(choice).items():
            left, right = (cut["left"], cut["right"]) if "left" in cut else (cut["weight"], None)
            if self.broken == (target, next(iter(choice.counts.values()))):
                left = left * math.nan
            bias = cut.get("bias", getattr(self.model.get_submodule(name), "bias", None))
            made[name] = Pair(left, torch.eye(left.shape[1]) if right is None else right, bias)
        return made

    @contextmanager
    def swapped(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        before = {name: self.model.get_submodule(name) for name in modules}
        for name, module in modules.items():
            self.model.set_submodule(name, module)
        try:
            yield
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module)


class Channels(Candidate):
    """An FFN's first channels."""

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        (up, down), count = (part.module for part in self.target.parts), choice.counts["channel"]
        weights = self.weights()
        bias = {"bias": weights["bias"][:count]}
        return {up: {"weight": weights[up][:count], **bias}, down: {"weight": weights[down][:, :count]}}


def setting(blocks: int = 3, format: str = "low_rank", ffn: int | None = None) -> tuple[ToyLive, list[Target]]:
    """The toy with its targets; one block's FFN as a whole if asked."""
    model, targets, candidates = Toy(blocks), [], {}
    for index in range(blocks):
        names = {role: f"blocks.{index}.{role}" for role in ("up", "down")}
        weights = {name: model.get_submodule(name).weight.detach() for name in names.values()}
        parts = [Part(name, *weights[name].shape, name) for name in names.values()]
        if index == ffn:
            target = Target(f"blocks.{index}", "ffn", (index,), tuple(parts))
            weights["bias"] = model.blocks[index].up.bias.detach()
            units = Units("channel", torch.arange(INNER, 0, -1).float(), None, 2 * HIDDEN)
            candidates[target.name] = Channels(target, (units,), dict, lambda weights=weights: weights, "dense")
            targets.append(target)
            continue
        for part, role in zip(parts, names, strict=True):
            target = Target(part.module, role, (index,), (part,))
            made = PlainSVD().decompose(target, weights, {part.module: {}})
            candidates[target.name] = made.priced(format, budget.unit_cost(format, part))
            targets.append(target)
    return ToyLive(model, candidates), targets


def problem(live: ToyLive, targets: list[Target], ratio: float, format: str = "low_rank", **more: Any) -> Problem:
    allowed = budget.allowed(targets, ratio)
    return Problem(targets, allowed, format, torch.Generator(), candidates=live.candidates, live=live, **more)


def by_full_passes(live: ToyLive, kind: str, choices: Mapping[str, Choice | None]) -> float:
    """The deviation of a whole plan from the dense model, in float64 at the end."""

    def outputs() -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for ids in live.batches():
            state = live.run(ids, live.enter(ids), 0, live.blocks)
            found.append((ids, state.double(), torch.log_softmax(live.logits(ids, state).double(), -1)))
        return found

    dense = outputs()
    with live.installed(Plan({name: c for name, c in choices.items() if c is not None}, 0, 0)):
        other = outputs()
    if kind == "kl":
        each = [(p.exp() * (p - q)).sum(-1).flatten() for (_, _, p), (_, _, q) in zip(dense, other, strict=True)]
        return float(torch.cat(each).mean())
    if kind == "hidden":
        away = sum(float((h - g).square().sum()) for (_, h, _), (_, g, _) in zip(dense, other, strict=True))
        return away / sum(float(h.square().sum()) for _, h, _ in dense)
    lost = [-p[:, :-1].gather(-1, ids[:, 1:, None]).flatten() for ids, _, p in other]
    return math.exp(float(torch.cat(lost).mean()))


def table(method: Deviation, asked: Problem) -> tuple[dict[str, Row], dict[str, dict[int, Choice | None]]]:
    options = method.options(asked)
    return method.table(asked, options)[0], options


def test_the_toy_is_live() -> None:
    assert isinstance(setting()[0], Live)


@KINDS
@pytest.mark.parametrize("ffn", [None, 1])
def test_the_table_is_that_of_full_passes(kind: Any, ffn: int | None) -> None:
    live, targets = setting(ffn=ffn)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    asked = problem(live, targets, 0.4)
    rows, options = table(Deviation(grid=(0.0, 0.2, 0.4, 0.7), deviation=kind), asked)
    base = base_of(asked)
    of_base = by_full_passes(live, kind, base)
    for target in targets:
        row, choices = rows[target.name], options[target.name]
        assert row.costs == tuple(sorted(choices)) and len(choices) >= 3 and None in choices.values()
        for cost, loss, choice in zip(row.costs, row.losses, choices.values(), strict=True):
            assert cost == kept(choice, target)
            whole = by_full_passes(live, kind, {**base, target.name: choice})
            assert loss == pytest.approx(whole - of_base, abs=2e-6 * max(1.0, whole))
            assert kind == "perplexity" or whole >= 0
        assert row.losses[row.costs.index(kept(base[target.name], target))] == 0.0
    after = live.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_run_starts_at_the_block_of_its_target() -> None:
    live, targets = setting(blocks=6)
    method = Deviation(grid=(0.0, 0.2, 0.4, 0.6), length=5)
    options = method.options(problem(live, targets, 0.4))
    method.allocate(problem(live, targets, 0.4))
    measured = sum((6 - target.blocks[0]) * (len(options[target.name]) - 1) for target in targets)
    # two batches; beside the table: the dense model, the base state, and once through all blocks but the last
    assert live.passes == 2 * (measured + 6 + 6 + 5)


def test_a_killed_run_goes_on_and_a_finished_one_runs_nothing() -> None:
    live, targets = setting()
    plan = Deviation().allocate(problem(live, targets, 0.3))
    whole, memory, stop = live.passes, Remembered(), StopAtFour()
    live, _ = setting()
    with pytest.raises(KeyboardInterrupt):
        Deviation().allocate(problem(live, targets, 0.3, remember=memory, progress=stop))
    assert stop.seen == [("deviation", done, 6) for done in (1, 2, 3, 4)]
    first, again = live.passes, problem(live, targets, 0.3, remember=memory)
    assert Deviation().allocate(again) == plan
    assert live.passes - first < whole - first + 2 * (3 + 3), "beside what was left, only states are made again"
    first, asked = live.passes, live.asked
    assert Deviation().allocate(again) == plan
    assert (live.passes, live.asked) == (first, asked)
    # another base state, text or measure is another table
    count = len(memory.stored)
    Deviation().allocate(replace(again, budget=again.budget - 200))
    Deviation(deviation="hidden").allocate(again)
    Deviation(length=5).allocate(again)
    assert len(memory.stored) == 4 * count


@pytest.mark.parametrize("format", ["low_rank", "pivot"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
def test_the_budget_is_kept_and_used(format: str, ratio: float) -> None:
    live, targets = setting(format=format)
    asked = problem(live, targets, ratio, format)
    plan = Deviation(sequences=2).allocate(asked)
    choices = {target: plan.choices.get(target.name) for target in targets}
    assert plan.budget == asked.budget
    assert plan.spent == sum(kept(choice, target) for target, choice in choices.items()) <= asked.budget
    assert all(kept(c, t) < t.parameters for t, c in choices.items() if c is not None)
    assert asked.budget - plan.spent < HIDDEN + INNER
    assert Plan.from_json(plan.to_json()) == plan
    for order in (targets[::-1], targets[2:] + targets[:2]):
        assert Deviation(sequences=2).allocate(replace(asked, targets=order)) == plan


def test_channels_of_a_whole_ffn_are_spent_too() -> None:
    live, targets = setting(ffn=0)
    plan = Deviation().allocate(problem(live, targets, 0.4))
    assert plan.budget - plan.spent < HIDDEN + INNER
    assert "blocks.0" not in plan.choices or plan.choices["blocks.0"].counts.keys() == {"channel"}


def test_no_plan_of_the_grid_is_better() -> None:
    live, targets = setting(blocks=2)
    asked, method = problem(live, targets, 0.4), Deviation(grid=(0.0, 0.2, 0.5, 0.8), gap=0.0)
    rows, _ = table(method, asked)
    combinations = itertools.product(*(zip(row.costs, row.losses, strict=True) for row in rows.values()))
    feasible = [each for each in combinations if sum(cost for cost, _ in each) <= asked.budget]
    least = min(sum(loss for _, loss in each) for each in feasible)
    plan = method.allocate(asked)
    found = sum(rows[t.name].at(kept(plan.choices.get(t.name), t)) for t in targets)
    assert least < 0 and found <= least + 1e-9, "topping up only adds to it"


def test_what_does_not_matter_is_given_up() -> None:
    live, targets = setting()
    with torch.no_grad():
        live.model.blocks[1].down.weight.zero_()
    plan = Deviation(highest=0.8).allocate(problem(live, targets, 0.4))
    spent = {t.name: kept(plan.choices.get(t.name), t) for t in targets}
    useless = ("blocks.1.up", "blocks.1.down")
    assert max(spent[name] for name in useless) < min(spent[name] for name in spent.keys() - set(useless))


def test_nothing_is_asked_of_the_model_where_all_stays_dense() -> None:
    _, targets = setting()
    dense = sum(target.parameters for target in targets)
    assert Deviation().allocate(Problem(targets, dense, "low_rank", torch.Generator())) == Plan({}, dense, dense)


@pytest.mark.parametrize(("ratio", "settings"), [(0.95, {}), (0.6, {"highest": 0.5})])
def test_a_ratio_that_is_too_large_is_refused_before_anything_runs(ratio: float, settings: Any) -> None:
    live, targets = setting()
    with pytest.raises(ValueError, match=f"ratio.*largest possible ratio here is {settings.get('highest', 0.9)}"):
        Deviation(**settings).allocate(problem(live, targets, ratio))
    assert live.passes == 0
    # a bias that comes with any rank can be more than is left: 96 of 1440 parameters
    biased = {t.name: replace(live.candidates[t.name], fixed_cost=t.parts[0].out_features) for t in targets}
    with pytest.raises(ValueError, match=r"ratio.*smallest choices need 96.*largest possible ratio here is 0\.9333"):
        Deviation(grid=(0.97,), highest=0.97).allocate(replace(problem(live, targets, 0.95), candidates=biased))
    assert live.passes == 0
    assert Deviation(highest=0.5).allocate(problem(live, targets, 0.5)).spent <= budget.allowed(targets, 0.5)


def test_a_deviation_that_is_not_finite_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    live, targets = setting()
    live.broken = ("blocks.1.up", 1)
    plan = Deviation().allocate(problem(live, targets, 0.4))
    assert plan.choices["blocks.1.up"].counts["rank"] != 1 if "blocks.1.up" in plan.choices else True
    (note,) = plan.notes
    assert "blocks.1.up" in note and f"ratio {1 - 32 / 240:.4f}" in note and note in caplog.text
    rank = base_of(problem(live, targets, 0.4))["blocks.1.up"]
    assert rank is not None
    live.broken = ("blocks.1.up", rank.counts["rank"])
    with pytest.raises(ValueError, match="deviation nan"):
        Deviation().allocate(problem(live, targets, 0.4))


def test_some_are_measured_and_the_others_interpolated() -> None:
    (live, targets), memory = setting(format="pivot"), Remembered()
    asked = problem(live, targets, 0.4, "pivot", remember=memory)
    rows, options = table(Deviation(), asked)
    whole = live.passes
    some, _ = table(Deviation(interpolate=4), asked)
    assert live.passes - whole < whole / 1.5
    for target in targets:
        exact, row = rows[target.name], some[target.name]
        assert row.costs == exact.costs and all(math.isfinite(loss) for loss in row.losses)
        equal = [one == other for one, other in zip(row.losses, exact.losses, strict=True)]
        assert equal[0] and equal[-1] and 4 <= sum(equal) <= 5 < len(equal)
        if all(
            a >= b for a, b in itertools.pairwise(loss for loss, same in zip(row.losses, equal, strict=True) if same)
        ):
            assert all(a >= b for a, b in itertools.pairwise(row.losses)), "as monotone as what was measured"
    before = live.passes
    everything, _ = table(Deviation(interpolate=40), asked)
    assert everything == rows and live.passes == before
    assert options.keys() == rows.keys()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"grid": [0.1, 1.0]}, "1.0"),
        ({"highest": -0.1}, "-0.1"),
        ({"sequences": 0}, "sequences is 0"),
        ({"length": 1}, "length is 1"),
        ({"interpolate": 1}, "interpolate is 1"),
        ({"gap": 1.0}, "gap is 1.0"),
        ({"deviation": "cosine"}, "'cosine'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        registry.build("allocator", registry.allocators(), "deviation", settings)
    assert registry.build("allocator", registry.allocators(), "deviation", {"grid": [0.5]}).grid == (0.5,)
