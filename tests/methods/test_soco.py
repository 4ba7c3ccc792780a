"""SoCo's bookkeeping: what is trained, counted, exported and resumed. How good its plans are is for benchmarks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.calibrate.statistics import Gram
from spectrim.core import budget
from spectrim.core.plan import Part, Plan, Target
from spectrim.learn.gates import GatedLinear
from spectrim.methods.soco import SoCo
from spectrim.methods.svd import PlainSVD, WhitenedSVD
from spectrim.model import targets
from spectrim.model.live import Installed
from spectrim.model.targets import oriented
from tests.conftest import save_model
from tests.families import FAMILIES, VOCABULARY
from tests.learn.toys import WINDOWS, Setting, setting, uniform

TEXT = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
STEPS = 10
# fast enough for a few steps to decide something
QUICK = {"steps": STEPS, "batch": 2, "rate": 0.3, "offset_rate": 0.02, "sequences": 4, "length": 12}
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
SOME = ("self_attn.q_proj", "self_attn.k_proj", "up_proj", "down_proj")


def trained(made: Setting, ratio: float, seed: int = 0, **settings: Any) -> tuple[Plan, dict[str, Tensor]]:
    """The plan, and what the training behind it came to."""
    found: dict[str, Tensor] = {}

    def remember(
        name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        found.update(make())
        return found

    method = SoCo(**{**QUICK, **settings})
    return method.allocate(made.problem(ratio, seed, remember=remember)), found


def with_learned(made: Setting, plan: Plan) -> Installed:
    """The model as an allocator sees it, its candidates with what was learned."""
    candidates = {n: replace(c, learned=plan.learned.get(n, {})) for n, c in made.candidates.items()}
    return Installed(made.model, made.live.structure, candidates, WINDOWS, 2)


def recipe_of(folder: Path, match: str = '"*"', format: str = "plain", method: str = "svd", **settings: Any) -> str:
    asked = ", ".join(f"{key}: {json.dumps(value)}" for key, value in {**QUICK, **settings}.items())
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(
        f"groups:\n  - match: {match}\n    ratio: 0.3\n    format: {format}\n    decompose: {{method: {method}}}\n"
        f"    allocate: {{method: soco, {asked}}}\n"
    )
    return str(path)


def linear_parameters(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """Numbers in the module of each target, as built."""
    return {
        name: sum(t.numel() for t in model.get_submodule(name).state_dict().values() if t.is_floating_point())
        for name in plan.choices
    }


# --- the training ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_it_starts_at_the_dense_model_and_leaves_the_weights_alone(family: str) -> None:
    made = setting(family)
    before, dense = made.state(), made.logits()
    plan, found = trained(made, 0.3, steps=4)
    assert abs(plan.curves["soco kl"][0]) < 1e-6 < max(plan.curves["soco kl"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert torch.equal(made.logits(), dense)
    assert not any(parameter.grad is not None for parameter in made.model.parameters())
    assert not any(tensor.requires_grad for made in plan.learned.values() for tensor in made.values())
    assert (found["offsets"] != 0).any() and len({len(values) for values in plan.curves.values()}) == 1


@pytest.mark.parametrize("mapping", ["sigmoid", "relu", "clamp"])
def test_scores_start_at_one_and_stay_in_their_range(mapping: Any) -> None:
    method = SoCo(mapping=mapping, largest=1.7)
    raw = torch.linspace(-8, 8, 81).requires_grad_()
    scores = method.scores(raw)
    assert float(method.scores(torch.tensor([method.begin()]))) == pytest.approx(1, abs=1e-6)
    assert float(scores.min().detach()) >= 0 and (scores.diff() >= 0).all()
    if mapping != "relu":
        assert float(scores.max().detach()) <= 1.7 + 1e-6
    (gradient,) = torch.autograd.grad(scores.sum(), raw)
    assert mapping == "clamp" or (gradient > 0).all(), "what is switched off can come back"
    plan, _ = trained(setting(match=SOME), 0.4, mapping=mapping)
    for made in plan.learned.values():
        assert (made["scale"] >= 0).all()
        assert mapping == "relu" or (made["scale"] <= 2).all()


@pytest.mark.parametrize("method", [PlainSVD(), WhitenedSVD()])
def test_the_error_at_its_own_output_teaches_no_score(method: Any) -> None:
    dense = nn.Linear(9, 6).double()
    x = uniform(60 * 9, -1.0).double().view(60, 9) * torch.arange(1, 10)
    target, weight = Target("layer", "up", (0,), (Part("layer", 6, 9, "x", True),)), dense.weight.detach()
    gated = GatedLinear(method.decompose(target, {"layer": weight}, {"layer": {Gram(): x.T @ x}}), dense)
    for seed in range(4):
        kept = uniform(6, seed=seed) < 0.6
        gate = kept.double().requires_grad_()
        gated.gate = gate
        (gated(x) - dense(x)).square().sum().backward()
        assert gate.grad is not None
        scale = (gated.left.norm(dim=0) * (x @ gated.right.T).norm(dim=0)).square()
        assert (gate.grad[kept].abs() < 1e-9 * scale.max()).all()
        assert (gate.grad[~kept] < -1e-3 * scale[~kept]).all(), "what is missing would be wanted"


@pytest.mark.parametrize(("steps", "shares"), [(10, (0.4, 0.3, 0.3)), (1000, (0.4, 0.3, 0.3)), (7, (0.5, 0.0, 0.5))])
def test_stages_follow_each_other_at_their_shares(steps: int, shares: Any) -> None:
    method = SoCo(steps=steps, stages=shares)
    found = [method.stage(step) for step in range(steps)]
    assert [stage for stage, _ in found] == sorted(stage for stage, _ in found)
    for index, share in enumerate(shares):
        inside = [through for stage, through in found if stage == index]
        assert abs(len(inside) - share * steps) <= 1
        assert inside == [i / len(inside) for i in range(len(inside))]
    assert method.stage(steps) == (2, 1.0)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.4, 0.3, 0.3)]
)
def test_the_set_is_fixed_however_few_the_steps(shares: Any) -> None:
    for steps in range(1, 12):
        method = SoCo(steps=steps, stages=shares)
        assert method.stage(steps) == (2, 1.0), f"{steps} steps: the end is the end of the last stage"
    _, found = trained(setting(match=["up_proj"]), 0.3, steps=3, stages=shares)
    assert 1 <= int(found["fixed_at"]) <= 3 and (found["fixing"] > 0).all()


def test_targets_and_pressure_by_stage() -> None:
    steps, swing = 20, 0.1
    made = setting(match=SOME)
    plan, found = trained(made, 0.3, steps=steps, swing=swing, turns=1, dual=200.0)
    method = SoCo(**{**QUICK, "steps": steps})
    curves = {name.removeprefix("soco "): values for name, values in plan.curves.items()}
    stage = [method.stage(step)[0] for step in range(steps)]
    of = {index: [step for step in range(steps) if stage[step] == index] for index in range(3)}
    wanted, soft, pressure = curves["target"], curves["soft_ratio"], curves["multiplier"]
    share = plan.budget / sum(target.parameters for target in made.targets)
    # coarse: from the beginning straight to the target
    falls = [a - b for a, b in zip(wanted, (wanted[i] for i in of[0][1:]), strict=False)]
    assert wanted[0] == pytest.approx(soft[0]) and soft[0] > 0.95, "nearly everything is there"
    assert max(falls) == pytest.approx(min(falls)) and wanted[of[0][-1]] - falls[0] == pytest.approx(share)
    # refine: above and below it, ever less; sparsify: there
    about = [wanted[step] - share for step in of[1]]
    assert max(about) > swing / 3 and min(about) < -swing / 9 and max(map(abs, about)) <= swing
    assert [wanted[step] for step in of[2]] == pytest.approx([share] * len(of[2]))
    # where too much is kept there is pressure, which ends once it has done its work
    above = [step for step in of[0][1:] if soft[step] > wanted[step - 1]]
    assert above and all(pressure[step] > 0 for step in above)
    assert pressure[0] == 0 == min(pressure)
    assert any(after < before for before, after in itertools.pairwise(pressure))
    assert soft[of[1][-1]] < soft[0] and soft[of[0][-1]] < soft[0], "it follows"
    assert of[2][0] < int(found["fixed_at"]) <= of[2][-1]
    assert all(0 <= value <= 1 for value in (*curves["polarised"], *curves["hard_ratio"]))


def test_the_same_seed_gives_the_same_training() -> None:
    one, first = trained(setting(match=SOME), 0.3, steps=6)
    two, again = trained(setting(match=SOME), 0.3, steps=6)
    other, another = trained(setting(match=SOME), 0.3, seed=1, steps=6)
    assert one.dumps() == two.dumps() and first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["scores"], another["scores"]) and other.spent <= other.budget


def test_offsets_are_learned_at_their_own_rate_or_not_at_all() -> None:
    still, found = trained(setting(match=SOME), 0.3, steps=4, offset_rate=0.0)
    assert (found["offsets"] == 0).all() and any("offset" in made for made in still.learned.values())
    without, found = trained(setting(match=SOME, **NO_BIAS), 0.3, steps=4, deviation=False)
    assert (found["offsets"] == 0).all() and not any("offset" in made for made in without.learned.values())
    assert not any(choice.bias for choice in without.choices.values())


def test_what_runs_at_once_and_what_is_made_again_changes_little() -> None:
    one, first = trained(setting(match=SOME), 0.3, steps=2)
    two, again = trained(setting(match=SOME), 0.3, steps=2, recompute=True)
    assert one.curves["soco kl"][1] == pytest.approx(two.curves["soco kl"][1], rel=1e-4)
    torch.testing.assert_close(first["scores"], again["scores"], rtol=0, atol=1e-3)


# --- what is exported ---


@FORMATS
@pytest.mark.parametrize(("family", "changes"), [("llama", NO_BIAS), ("gpt2", {})], ids=["llama", "gpt2"])
def test_the_plan_is_the_trained_model(family: str, changes: dict[str, Any], format: str) -> None:
    made = setting(family, format, **changes)
    dense, before = made.logits(), made.state()
    plan, found = trained(made, 0.2)
    with made.gates() as gates:
        gates.set(found["scores"], found["offsets"])
        gated = made.logits()
    live = with_learned(made, plan)
    with live.installed(plan), torch.no_grad():
        built = live.answer(WINDOWS)
    torch.testing.assert_close(built, gated, rtol=1e-4, atol=1e-4)
    assert (built - dense).abs().max() > 0.05
    # what is kept is what has a score, as many as the rank; dense matrices keep all
    fixed = {t.name: t.parts[0].out_features for t in made.targets if not t.parts[0].bias}
    for name, own in gates.slices.split(found["scores"]).items():
        choice, part = plan.choices[name], made.candidates[name].target.parts[0]
        if choice.formats[name] == "dense":
            assert (own > 0).all() and choice.counts == {} and not choice.bias
            continue
        rank = choice.counts["rank"]
        assert int((own > 0).sum()) == rank <= budget.largest_rank(format, part)
        assert budget.count(choice, made.candidates[name].target) < part.parameters
        assert set(plan.learned[name]["order"][:rank].tolist()) == set(own.nonzero().flatten().tolist())
        assert choice.bias == (name in fixed)
    assert plan.choices.keys() == made.candidates.keys()
    spent = sum(budget.count(plan.choices[t.name], t) for t in made.targets)
    assert plan.spent == spent <= plan.budget and plan.budget - spent < 2 * (128 + 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


def test_dense_matrices_keep_what_was_learned() -> None:
    for changes in (NO_BIAS, {"attention_bias": True, "mlp_bias": True}):
        made = setting(match=SOME, **changes)
        plan, found = trained(made, 0.05)
        stay = [name for name, choice in plan.choices.items() if choice.formats[name] == "dense"]
        assert stay and len(stay) < len(plan.choices)
        scores = made.gates().slices.split(found["scores"])
        for name in stay:
            weight, bias = made.candidates[name].weights()[name], made.model.get_submodule(name).bias
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            built = with_learned(made, plan).built(name, plan.choices[name])[name]
            expected = (u * (s * scores[name])) @ v
            torch.testing.assert_close(built.weight.detach(), expected, rtol=0, atol=1e-5)
            assert (built.weight.detach() - weight).abs().max() > 1e-3
            assert (built.bias is None) == (bias is None)
            if bias is not None:
                assert (built.bias - bias).abs().max() > 1e-4, "the offset too"
            else:
                places = made.gates().outputs.of[name]
                assert (found["offsets"][places] == 0).all(), "it was trained without one since the set was fixed"


@pytest.mark.parametrize(("family", "format"), [("llama", "plain"), ("gpt2", "plain"), ("phi3", "pivot")])
def test_the_saved_model_has_the_parameters_of_the_plan(family: str, format: str, tmp_path: Path) -> None:
    changes = NO_BIAS if family == "llama" else {}
    directory, out = save_model(FAMILIES[family].make(**changes), tmp_path / "dense"), tmp_path / "out"
    asked = recipe_of(tmp_path, format=format, steps=3)
    result = spectrim.compress(directory, asked, text=TEXT, out=out)
    model = AutoModelForCausalLM.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(directory)
    structure = targets.find(dense)
    numbers = result.summary["parameters"]
    before, after = sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in model.parameters())
    assert before - after == numbers["targets_before"] - numbers["targets_after"]
    assert result.plan.spent == numbers["targets_after"] <= result.plan.budget
    for name, size in linear_parameters(model, result.plan).items():
        had = dense.get_submodule(name).bias
        target = structure.named(name)
        assert size == budget.count(result.plan.choices[name], target) + (0 if had is None else had.numel())
        new = target.parts[0].out_features if had is None and result.plan.choices[name].counts else 0
        assert (model.get_submodule(name).bias is None) == (had is None and not new)
    live = FAMILIES[family].make(**changes)
    assert spectrim.compress(live, asked, text=TEXT).plan.dumps() == result.plan.dumps()
    with torch.no_grad():
        torch.testing.assert_close(live(TEXT).logits, model(TEXT).logits, rtol=0, atol=1e-5)
        assert (dense(TEXT).logits - model(TEXT).logits).abs().max() > 0.05
    assert json.loads((out / "spectrim.json").read_text())["plan"]["curves"].keys() == result.plan.curves.keys()
    if family == "gpt2":  # an offset goes into the bias that is there
        assert not any(choice.bias for choice in result.plan.choices.values())
        name = next(iter(result.plan.choices))
        assert (model.get_submodule(name).bias - dense.get_submodule(name).bias).abs().max() > 1e-3
    else:
        assert any(choice.bias for choice in result.plan.choices.values())


def test_untrained_weights_are_written_as_they_were(tmp_path: Path) -> None:
    directory, out = save_model(FAMILIES["llama"].make(), tmp_path / "dense"), tmp_path / "out"
    spectrim.compress(directory, recipe_of(tmp_path, match="[up, down]", steps=3), text=TEXT, out=out)
    model, dense = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(directory)
    others = [n for n in dense.state_dict() if "up_proj" not in n and "down_proj" not in n]
    assert others and all(torch.equal(model.state_dict()[n], dense.state_dict()[n]) for n in others)


def test_oriented_weights_of_gpt2_are_scaled_as_they_are_read() -> None:
    made = setting("gpt2", match=["c_fc"])
    plan, _ = trained(made, 0.05, steps=4)
    live = with_learned(made, plan)
    for name, choice in plan.choices.items():
        built = live.built(name, choice)[name]
        whole = built.weight.detach() if choice.formats[name] == "dense" else built.dense()
        assert whole.shape == oriented(made.model.get_submodule(name), made.model.get_submodule(name).weight).shape
