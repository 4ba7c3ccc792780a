"""Gates against the dense model, against weights made by hand, and against the counting of whole units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from spectrim.calibrate.statistics import Norm
from spectrim.core import budget
from spectrim.core.plan import Part, Target
from spectrim.learn.gates import GatedLinear, Gates, Slices, check_memory
from spectrim.methods.lorap import ChannelPrune
from spectrim.model import targets
from spectrim.model.checkpoint import LiveModel
from spectrim.model.live import Installed
from spectrim.model.targets import oriented
from tests.conftest import save_model
from tests.families import FAMILIES
from tests.learn.toys import WINDOWS, Setting, layer, reader, setting, sparse_candidate, uniform

# grouped queries; Conv1D, fused, with biases; fused without biases
FORMS = pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
FORMATS = pytest.mark.parametrize("format", ["low_rank", "pivot"])
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def weights_changed(model: nn.Module, changed: dict[str, Tensor]) -> Iterator[None]:
    """The dense model with other matrices, given out × in."""
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in changed}
    with torch.no_grad():
        for name, weight in changed.items():
            oriented(model.get_submodule(name), model.get_parameter(f"{name}.weight")).copy_(weight)
    yield
    with torch.no_grad():
        for name, weight in before.items():
            model.get_parameter(f"{name}.weight").copy_(weight)


def with_channels(family: str) -> Setting:
    """The FFNs as wholes, the other matrices by their directions."""
    made = setting(family)
    source, structure = LiveModel(made.model), made.live.structure
    inside = {part.module for ffn in structure.ffns for part in ffn.parts}
    candidates = {name: c for name, c in made.candidates.items() if name not in inside}
    for ffn in structure.ffns:
        stats = {p.module: {Norm(power=2): uniform(p.in_features, seed=i)} for i, p in enumerate(ffn.parts)}
        weights = reader(source, ffn)
        candidates[ffn.name] = replace(ChannelPrune().decompose(ffn, weights(), stats), weights=weights)
    return Setting(made.model, Installed(made.model, structure, candidates, WINDOWS, 2), candidates)


# --- the whole model ---


@FORMS
def test_gates_of_one_are_the_dense_model(family: str) -> None:
    made = setting(family)
    dense, before = made.logits(), made.state()
    assert dense.std() > 0.3, "differences would show"
    with made.gates() as gates:
        assert gates.modules.keys() == made.candidates.keys()
        for flat, offset in [
            (None, None),
            (torch.ones(gates.slices.total), None),
            (torch.ones(gates.slices.total), torch.zeros(gates.outputs.total)),
        ]:
            gates.set(flat, offset)
            torch.testing.assert_close(made.logits(), dense, **CLOSE)
        gates.set(torch.ones(gates.slices.total) * 0.5)
        assert (made.logits() - dense).abs().max() > 0.1
    assert torch.equal(made.logits(), dense) and equal_states(made.state(), before)


@FORMS
def test_only_what_is_set_gets_gradients(family: str) -> None:
    made = setting(family)
    before, learns = made.state(), {name: p.requires_grad for name, p in made.model.named_parameters()}
    with made.gates() as gates:
        flat, offset = (
            torch.ones(gates.slices.total).requires_grad_(),
            torch.zeros(gates.outputs.total).requires_grad_(),
        )
        gates.set(flat, offset)
        made.live.answer(WINDOWS[:2]).square().mean().backward()
    assert flat.grad is not None and offset.grad is not None
    for name, place in gates.slices.of.items():
        assert flat.grad[place].abs().max() > 0, name
    assert [name for name, p in made.model.named_parameters() if p.grad is not None] == []
    assert equal_states(made.state(), before)
    assert {name: p.requires_grad for name, p in made.model.named_parameters()} == learns


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_the_dense_weights_come_back_after_an_error_too(family: str, on_disk: bool, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family].make(), tmp_path / "model") if on_disk else None
    made = setting(family, checkpoint=directory)
    before, modules = made.state(), dict(made.model.named_modules())
    with pytest.raises(KeyboardInterrupt), made.gates() as gates:
        gates.set(uniform(gates.slices.total))
        assert isinstance(made.model.get_submodule(made.targets[0].name), GatedLinear)
        raise KeyboardInterrupt
    assert equal_states(made.state(), before)
    assert all(made.model.get_submodule(name) is module for name, module in modules.items())
    assert all(p.is_contiguous() for p in made.model.parameters())


def test_gates_that_cannot_be_put_in_leave_the_model_as_it_was() -> None:
    made = setting()
    before, modules = made.state(), dict(made.model.named_modules())

    def unreadable() -> dict[str, Tensor]:
        raise OSError("no such file")

    third = sorted(made.candidates)[2]
    broken = {**made.candidates, third: replace(made.candidates[third], tensors=unreadable)}
    with pytest.raises(OSError, match="no such file"), Gates(made.live, broken, "low_rank"):
        raise AssertionError("never inside")
    assert all(made.model.get_submodule(name) is module for name, module in modules.items())
    assert equal_states(made.state(), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_can_be_read_again_are_let_go(family: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[family].make(), tmp_path / "model")
    made = setting(family, checkpoint=directory)
    linears = {name: made.model.get_submodule(name) for name in made.candidates}
    held = {name: StorageWeakRef(m.get_parameter("weight").untyped_storage()) for name, m in linears.items()}
    shapes = {name: m.get_parameter("weight").shape for name, m in linears.items()}
    with made.gates() as gates:
        gates.set(torch.ones(gates.slices.total))
        assert all(reference.expired() for reference in held.values())
        assert all(m.get_parameter("weight").numel() == 0 for m in linears.values())
        made.logits()
    assert {name: m.get_parameter("weight").shape for name, m in linears.items()} == shapes


def test_weights_in_memory_stay_where_they_are() -> None:
    made = setting("gpt2")
    places = {name: p.data_ptr() for name, p in made.model.named_parameters()}
    with made.gates():
        pass
    assert {name: p.data_ptr() for name, p in made.model.named_parameters()} == places


@FORMS
def test_the_bypass_is_the_dense_model_whatever_is_set(family: str) -> None:
    made = setting(family)
    dense = made.logits()
    with made.gates() as gates:
        gates.set(uniform(gates.slices.total).requires_grad_(), torch.ones(gates.outputs.total))
        name, module = next(iter(gates.modules.items()))
        part = made.candidates[name].target.parts[0]
        assert isinstance(module, GatedLinear)
        module.further = (torch.ones(part.out_features, 2), torch.ones(2, part.in_features))
        gated = made.logits()
        with gates.bypass():
            torch.testing.assert_close(made.live.answer(WINDOWS), dense, **CLOSE)
            assert not made.live.answer(WINDOWS).requires_grad
        assert torch.equal(made.logits(), gated) and (gated - dense).abs().max() > 0.1
        assert made.live.answer(WINDOWS[:1]).requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_made_again_change_nothing(family: str) -> None:
    made, found = setting(family), []
    with made.gates() as gates:
        start = uniform(gates.slices.total, 0.5, 1.5)
        for recompute in (False, True):
            flat = start.clone().requires_grad_()
            gates.set(flat)
            logits = made.live.answer(WINDOWS[:2], recompute)
            logits.log_softmax(-1)[..., 3].mean().backward()
            found.append((logits.detach(), flat.grad))
    (one, gradient), (other, again) = found
    assert gradient is not None and again is not None and gradient.abs().max() > 0
    torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(again, gradient, rtol=1e-5, atol=1e-8)


@FORMS
def test_folded_weights_give_what_gates_give(family: str) -> None:
    made = setting(family)
    with made.gates() as gates:
        flat = uniform(gates.slices.total)
        gates.set(flat)
        expected = made.logits()
        other = uniform(gates.slices.total, seed=1)
        gates.set(other)
        before = made.logits()
        with gates.folded(flat):
            torch.testing.assert_close(made.logits(), expected, **CLOSE)
            assert (expected - before).abs().max() > 0.1
            gates.set(other)
            assert torch.equal(made.logits(), before), "setting gates lets the folded weights go"
        assert torch.equal(made.logits(), before)


def test_folding_keeps_what_is_added_beside_the_gates() -> None:
    made = setting()
    with made.gates() as gates:
        flat, offset = uniform(gates.slices.total), uniform(gates.outputs.total, -0.2, 0.2)
        for name, module in gates.modules.items():
            part = made.candidates[name].target.parts[0]
            assert isinstance(module, GatedLinear)
            module.further = (uniform(part.out_features)[:, None], 0.1 * uniform(part.in_features)[None])
        gates.set(flat)
        expected = made.logits()
        gates.set(torch.ones(gates.slices.total), offset)
        before = made.logits()
        with gates.folded(flat):
            torch.testing.assert_close(made.logits(), expected, **CLOSE)
        assert torch.equal(made.logits(), before), "offsets are there again"


def test_the_teacher_folds_too() -> None:
    made = setting()
    dense = made.logits()
    with made.gates() as gates, gates.folded(torch.ones(gates.slices.total)):
        torch.testing.assert_close(made.logits(), dense, **CLOSE)


# --- channels ---


@FORMS
def test_channels_are_scaled_where_they_are_read(family: str) -> None:
    made = with_channels(family)
    dense, weights = made.logits(), {name: dict(c.weights()) for name, c in made.candidates.items()}
    with made.gates() as gates:
        ones = torch.ones(gates.slices.total)
        gates.set(ones)
        torch.testing.assert_close(made.logits(), dense, **CLOSE)
        flat = ones.clone()
        changed = {}
        for index, ffn in enumerate(made.live.structure.ffns):
            of_units = uniform(ffn.channels, 0.0, 2.0, seed=index)
            flat[gates.slices.of[ffn.name]] = of_units
            by_channel = torch.empty(ffn.channels)
            by_channel[made.candidates[ffn.name].tensors()["order"]] = of_units
            last = ffn.parts[-1].module
            changed[last] = weights[ffn.name][last] * by_channel
        learned = flat.clone().requires_grad_()
        gates.set(learned)
        gated = made.logits()
        made.live.answer(WINDOWS[:1]).square().mean().backward()
        with gates.folded(flat):
            torch.testing.assert_close(made.logits(), gated, **CLOSE)
        gates.set(None)
        torch.testing.assert_close(made.logits(), dense, **CLOSE)
    assert learned.grad is not None
    for ffn in made.live.structure.ffns:
        assert (learned.grad[gates.slices.of[ffn.name]] != 0).all()
    with weights_changed(made.model, changed):
        torch.testing.assert_close(made.logits(), gated, **CLOSE)
    assert (gated - dense).abs().max() > 0.1 and torch.equal(made.logits(), dense)


# --- counting ---


@FORMATS
@FORMS
def test_the_cost_at_whole_gates_is_that_of_the_parameters(family: str, format: str) -> None:
    made = setting(family, format)
    gates = made.gates()
    flat = (uniform(gates.slices.total) < 0.6).float()
    expected = 0
    for name, place in gates.slices.of.items():
        expected += budget.rank_cost(format, made.candidates[name].target.parts[0], int(flat[place].sum()))
    assert float(gates.kept_cost(flat)) == expected > 0
    assert float(gates.kept_cost(torch.zeros(gates.slices.total))) == 0
    assert gates.dense == sum(target.parameters for target in made.targets)


def test_the_cost_of_channels_and_entries() -> None:
    made = with_channels("llama")
    gates = made.gates()
    flat = uniform(gates.slices.total, high=0.6)
    ffn = made.live.structure.ffns[0]
    only = torch.zeros_like(flat)
    only[gates.slices.of[ffn.name]] = (uniform(ffn.channels) < 0.5).float()
    kept = int(only.sum())
    assert float(gates.kept_cost(only)) == kept * 3 * 32
    torch.testing.assert_close((gates.prices(flat) * flat).sum(), gates.kept_cost(flat))
    candidate, _, _ = sparse_candidate(layer(6, 9))
    both = Gates(made.live, {"layer": candidate}, "low_rank")
    gate = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 1, 0, 0.5, 0])
    assert float(both.kept_cost(gate)) == 2 * 15 + 2.5
    torch.testing.assert_close(both.prices(gate), torch.tensor([15.0] * 6 + [1.0] * 5))


@FORMATS
def test_the_cost_is_differentiable(format: str) -> None:
    gates = setting(format=format, match=["0.mlp.up_proj", "1.self_attn.k_proj"]).gates()
    flat = uniform(gates.slices.total, 0.05, 0.6).double().requires_grad_()
    assert torch.autograd.gradcheck(gates.kept_cost, (flat,))
    torch.testing.assert_close((gates.prices(flat) * flat).sum(), gates.kept_cost(flat))
    assert not gates.prices(flat).requires_grad


def test_slices_go_by_name() -> None:
    slices = Slices.make({"b": 2, "a": 3, "c": 1})
    assert dict(slices.of) == {"a": slice(0, 3), "b": slice(3, 5), "c": slice(5, 6)} and slices.total == 6
    found = slices.split(torch.arange(6.0))
    assert {name: values.tolist() for name, values in found.items()} == {"a": [0, 1, 2], "b": [3, 4], "c": [5]}


def test_hardened_gates_are_a_plan_of_the_best_scores() -> None:
    made = setting(match=["up_proj", "down_proj"])
    gates = made.gates()
    scores = uniform(gates.slices.total)
    plan = gates.harden(scores, gates.dense // 2)
    assert plan.spent <= gates.dense // 2 and plan.choices
    for name, choice in plan.choices.items():
        own = gates.slices.split(scores)[name]
        best = plan.learned[name]["order"][: choice.counts["rank"]]
        assert set(best.tolist()) == set(own.topk(len(best)).indices.tolist())


# four processes, three of them on this machine
TOGETHER = {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "3"}


def test_factors_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = targets.find(FAMILIES["llama"].make()).targets
    sizes = [(p.out_features, p.in_features) for target in found for p in target.parts]
    needed = 4 * sum((m + n) * min(m, n) for m, n in sizes)
    check_memory(found, needed)
    check_memory(found)
    with pytest.raises(ValueError, match=r"whole model in memory.*use an allocator that does not train"):
        check_memory(found, needed - 1)
    check_memory(found, needed // 2, itemsize=2)
    for name, value in TOGETHER.items():
        monkeypatch.setenv(name, value)
    check_memory(found, 3 * needed)
    with pytest.raises(ValueError, match=r"GB for each of 3 processes, and .*fewer processes"):
        check_memory(found, 3 * needed - 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    check_memory(found, needed)
    wide = Target("large", "up", (0,), (Part("large", 10**6, 10**6, "x"),))
    with pytest.raises(ValueError, match=r"factors alone 8000\.0 GB"):
        check_memory([wide])
