"""Pruning while tuning: the schedule to the weight, importance and cut by their definitions, masks that nest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spectrim.core.finetuner import Batch, Session, finetuners
from spectrim.finetune.prune import Prune, Pruning, cut, ordered
from tests.families import FAMILIES, VOCABULARY, linears
from tests.model.test_loading import block_list

FEW = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
SCOPES = pytest.mark.parametrize("scope", ["global", "matrix"])


class Text:
    """A batch of random tokens, another one each step; counts its passes."""

    def __init__(self, model: Any, step: int) -> None:
        self.model, self.passes = model, 0
        self.ids = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(step))

    def answer(self) -> Any:
        self.passes += 1
        return self.model(input_ids=self.ids, use_cache=False)

    def score(self, answer: Any) -> Tensor:
        return nn.functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def distance(self, first: Any, second: Any) -> Tensor:
        p, q = (answer.logits[:, :-1].log_softmax(-1) for answer in (first, second))
        return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def optimizer_of(session: Session, rate: float = 1e-2) -> torch.optim.Optimizer:
    trained = [p for p in session.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.1)


def run(session: Session, optimizer: torch.optim.Optimizer, steps: range, total: int) -> None:
    """The loop, as small as it gets."""
    for step in steps:
        batch = Text(session.model, step)
        assert isinstance(batch, Batch)
        optimizer.zero_grad()
        session.before(step, total)
        session.loss(batch).backward()
        session.differentiated(step, total)
        optimizer.step()
        session.moved(step, total)


def begun(family: str, **settings: Any) -> Pruning:
    return begun_on(FAMILIES[family].make().requires_grad_(False), **settings)


def begun_on(model: PreTrainedModel, **settings: Any) -> Pruning:
    session = Prune(**settings).begin(model, 0, torch.Generator().manual_seed(3))
    assert isinstance(session, Pruning)
    return session


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: layer.get_parameter("weight") for name, layer in linears(model, block_list(model)).items()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_what_it_is() -> None:
    kind = finetuners()["prune"]
    assert kind is Prune
    assert (Prune().wants, Prune().beside, Prune().stages, Prune().learning_rate) == ("dense", False, 1, 2e-5)


@FEW
@SCOPES
def test_the_share_kept_is_the_schedule_to_the_weight_and_masks_nest(family: str, scope: Any) -> None:
    session = begun(family, density=0.3, scope=scope, warm=0.2, cool=0.3)
    optimizer, total, before = optimizer_of(session), 10, dict(session.masks)
    groups = [[name] for name in before] if scope == "matrix" else [list(before)]
    for step in range(total):
        run(session, optimizer, range(step, step + 1), total)
        # warm: 2 moves, cool: 3, so that pruning ends with the seventh
        left = min(1.0, max(0.0, 1 - (step + 1 - 2) / 5))
        for group in groups:
            size = sum(before[name].numel() for name in group)
            kept = sum(int((weights(session.model)[name] != 0).sum()) for name in group)
            assert kept == round((0.3 + 0.7 * left**3) * size)
        for name, mask in session.masks.items():
            assert not (mask & ~before[name]).any(), "nothing comes back"
            assert torch.equal(weights(session.model)[name] != 0, mask)
        assert bool(session.importance) == (step + 1 < 7)
        before = dict(session.masks)


@SCOPES
def test_importance_and_cut_are_their_definitions(scope: Any) -> None:
    session = begun("llama", density=0.25, scope=scope, smoothing=0.6, warm=0.0, cool=0.0)
    mean = {name: torch.zeros_like(weight) for name, weight in weights(session.model).items()}
    for step in range(3):  # v(1) = 0.25 + 0.75 (2/3)³ of three
        for seed, (name, weight) in enumerate(weights(session.model).items()):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + seed))
            gradient = weight.grad.clone()
            mean[name] = 0.6 * mean[name] + 0.4 * (weight.detach() * gradient).abs()
        session.differentiated(step, 4)
        for name, weight in weights(session.model).items():
            torch.testing.assert_close(session.importance[name], mean[name])
            assert weight.grad is not None and torch.equal(weight.grad != 0, session.masks[name])
        alive = {name: mask.clone() for name, mask in session.masks.items()}
        session.moved(step, 4)
        share = 0.25 + 0.75 * (1 - (step + 1) / 4) ** 3
        for group in [[name] for name in mean] if scope == "matrix" else [list(mean)]:
            flat = torch.cat([torch.where(alive[name], session.importance[name], -1).flatten() for name in group])
            kept = torch.zeros_like(flat, dtype=torch.bool)
            kept[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
            assert torch.equal(kept, torch.cat([session.masks[name].flatten() for name in group]))


def test_the_first_of_equals_stays() -> None:
    session = begun("llama", density=0.5, warm=0.0, cool=0.0)
    session.differentiated(0, 1)  # no gradient at all: every importance is 0
    session.moved(0, 1)
    flat = torch.cat([mask.flatten() for mask in session.masks.values()])
    assert int(flat.sum()) == round(len(flat) / 2)
    assert bool(flat[: len(flat) // 2].all())


@pytest.mark.parametrize("kind", ["random", "ties", "zero", "tiny"])
def test_the_cut_is_that_of_a_sort(kind: str) -> None:
    values = torch.rand(60, 7, generator=torch.Generator().manual_seed(1))
    values = {"random": values, "ties": (4 * values).round(), "zero": 0 * values, "tiny": values * 1e-42}[kind]
    keys = ordered(values, None)
    for keep in (0, 1, 17, 300, 419, 420):
        above, equal = cut(lambda: iter(keys.split(25)), keep)
        assert int((keys > above).sum()) + equal == keep
        assert 0 <= equal <= int((keys == above).sum())
        if keep > 0:
            last = values.flatten().sort(descending=True).values[keep - 1]
            assert bool((values[keys == above] == last).all()) and equal > 0


def test_what_is_pruned_comes_back_only_if_it_may() -> None:
    back = {}
    for frozen in (True, False):
        session = begun("llama", density=0.5, frozen=frozen, warm=0.0, cool=0.3, smoothing=0.5)
        optimizer, ever = optimizer_of(session), {name: ~mask for name, mask in session.masks.items()}
        for step in range(10):
            run(session, optimizer, range(step, step + 1), 10)
            ever = {name: ever[name] | ~mask for name, mask in session.masks.items()}
            if step >= 7:  # final after move 7: from there on nothing comes back
                assert all(not (w.grad[~session.masks[name]]).any() for name, w in weights(session.model).items())
        back[frozen] = sum(int((ever[name] & mask).sum()) for name, mask in session.masks.items())
    assert back[True] == 0 < back[False]


@FEW
def test_what_trains(family: str) -> None:
    sets = {}
    for settings in ({}, {"bias": True}, {"norms": True}):
        model = FAMILIES[family].make().requires_grad_(False)
        begun_on(model, **settings)
        sets[str(settings)] = trained(model).keys()
    only = {f"{name}.weight" for name in linears(model, block_list(model))}
    assert sets["{}"] == only
    biases = {f"{name}.bias" for name, layer in linears(model, block_list(model)).items() if layer.bias is not None}
    assert sets[str({"bias": True})] == only | biases
    added = sets[str({"norms": True})] - only
    assert len(added) >= 5 and all("norm" in name or "ln_" in name for name in added)


@FEW
def test_the_end_is_a_plain_model_with_zeros(family: str, tmp_path: Path) -> None:
    fresh, total = FAMILIES[family].make(), 6
    session = begun(family, density=0.4)
    run(session, optimizer_of(session), range(total), total)
    model, text = session.finish(), Text(session.model, 0)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(text.ids).logits, model(text.ids).logits)
    found = weights(again)
    size = sum(weight.numel() for weight in found.values())
    assert sum(int((weight == 0).sum()) for weight in found.values()) == size - round(0.4 * size)
    names = {f"{name}.weight" for name in found}
    assert all(torch.equal(p, again.get_parameter(n)) == (n not in names) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_resumed_run_is_the_same(stop: int) -> None:
    total, one = 9, begun("llama", density=0.3)
    run(one, optimizer_of(one), range(total), total)

    half = begun("llama", density=0.3)
    optimizer = optimizer_of(half)
    run(half, optimizer, range(stop), total)
    state: Mapping[str, Tensor] = {name: tensor.clone() for name, tensor in half.state().items()}
    assert any(name.startswith("importance.") for name in state) == (stop < 6)
    other = begun("llama", density=0.3)
    again = optimizer_of(other)
    again.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for name, tensor in trained(half.model).items():
            other.model.get_parameter(name).copy_(tensor)
    other.restore(state)
    run(other, again, range(stop, total), total)

    expected, found = one.finish().state_dict(), other.finish().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_step_that_overflowed_does_not_count() -> None:
    session = begun("llama", warm=0.0)
    run(session, optimizer_of(session), range(1), 10)
    before = {name: mean.clone() for name, mean in session.importance.items()}
    for i, weight in enumerate(weights(session.model).values()):
        weight.grad = torch.full_like(weight, float("inf") if i == 3 else 1.0)
    session.differentiated(1, 10)
    assert all(torch.equal(mean, before[name]) for name, mean in session.importance.items())


def test_density_1_prunes_nothing() -> None:
    session = begun("llama", density=1.0)
    run(session, optimizer_of(session), range(4), 4)
    assert all(bool((weight != 0).all()) for weight in weights(session.finish()).values())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.1}, "density is 1.1"),
        ({"density": float("nan")}, "density is nan"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"warm": -0.1}, "warm is -0.1"),
        ({"cool": 1.0}, "cool is 1.0"),
        ({"warm": 0.5, "cool": 0.5}, "leave no steps"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Prune(**settings)
